"""The environments of other readers, made outside the checkout: `python -m tests.readers.environments [NAME ...]`.

Most are folders of packages in front of this interpreter's own, so that torch lies on the disk once; vLLM has its own
torch, and llama.cpp comes from npm, prebuilt. All versions are pinned. They lie in `EQAT_READERS`, by default in the
cache, are made one after another, and kept: what is there and has these versions is not made again.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from eqat_mm.errors import DataError, EqatError
from scripts.demo_serve import PACKAGES as VLLM
from scripts.demo_serve import installed

_WHOLE = ".whole"
"""File in an environment that was made to the end: what it was made of."""

_LINES = 6
"""Of a program that failed, behind which nobody looks."""


@dataclass(frozen=True)
class Environment:
    """What a reader runs in.

    Attributes:
        packages: pinned, without what they depend on, in a folder in front of this interpreter's own packages.
        whole: pinned, with all they depend on, in an environment of their own.
        npm: pinned package of npm, unpacked.
        source: pinned, of which the sources are used as they are: building it would need a GPU's tools.
        over: name of the environment whose packages come behind these.
        proof: modules that can be imported at the end.
    """

    packages: tuple[str, ...] = ()
    whole: tuple[str, ...] = ()
    npm: str | None = None
    source: str | None = None
    over: str | None = None
    proof: str | None = None


ENVIRONMENTS = {
    **{
        f"transformers-5-ct-{'.'.join(version.split('.')[:2])}": Environment(
            (f"compressed-tensors=={version}",), proof="transformers, compressed_tensors.quantization"
        )
        for version in ("0.17.1", "0.18.0", "0.19.0", "0.20.0")
    },
    "transformers-4.57": Environment(("transformers==4.57.6", "huggingface_hub==0.36.2", "tokenizers==0.22.2")),
    **{
        f"transformers-4.57-ct-{'.'.join(version.split('.')[:2])}": Environment(
            (f"compressed-tensors=={version}",),
            over="transformers-4.57",
            proof="transformers, compressed_tensors.quantization",
        )
        for version in ("0.12.2", "0.15.0.1", "0.16.0", "0.18.0", "0.20.0")
    },
    "vllm": Environment(whole=VLLM, proof="vllm.entrypoints.llm"),
    "llama.cpp": Environment(npm="@node-llama-cpp/linux-x64@3.22.1"),
    "gptqmodel": Environment(
        (
            *("optimum==2.3.0", "tokenicer==0.0.14", "logbar==0.4.15", "device-smi==0.5.7", "defuser==0.0.28"),
            *("pypcre==0.6.4", "threadpoolctl==3.8.0", "torchao==0.18.0"),
        ),
        source="gptqmodel==7.7.0",
        proof="gptqmodel, optimum.gptq",
    ),
    "xllamacpp": Environment(("xllamacpp==2026.10.11549",), proof="xllamacpp"),
    "mlx": Environment(
        ("mlx==0.32.4", "mlx-cpu==0.32.4", "mlx-lm==0.32.2", "mlx-vlm==0.7.10"), proof="mlx.core, mlx_lm.utils"
    ),
    "onnxruntime": Environment(
        (
            *("onnxruntime==1.32.0", "onnxruntime-genai==0.18.0", "onnx==1.23.2", "onnx-ir==1.1.0"),
            *("ml_dtypes==0.6.0", "flatbuffers==25.12.19"),
        ),
        proof="onnxruntime, onnxruntime_genai.models.builder",
    ),
}
"""Name -> environment."""


def root() -> Path:
    """Return the folder of all environments."""
    cache = Path(os.environ.get("EQAT_CACHE", Path.home() / ".cache" / "eqat-mm"))
    return Path(os.environ.get("EQAT_READERS", cache / "readers"))


def made(name: str) -> Path:
    """Return the folder of an environment, which is made where it is not there yet, or of other versions.

    Raises:
        DataError: a program that makes it failed, or what was made does not run.
    """
    folder, one = root() / name, ENVIRONMENTS[name]
    whole, content = folder / _WHOLE, repr((one.packages, one.whole, one.npm, one.source))
    if not whole.is_file() or whole.read_text(encoding="utf-8") != content:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        _make(name, one, folder)
        _try(name, one)
        whole.write_text(content, encoding="utf-8")
    return folder


def command(name: str, program: Path, *arguments: str) -> tuple[list[str], dict[str, str]]:
    """Return the command that runs a program in an environment, and the variables that it needs."""
    folder = made(name)
    libraries = [str(next(folder.rglob("libllama.v*.so")).parent)] if ENVIRONMENTS[name].npm else []
    python, variables = _python(name)
    return [python, str(program), *libraries, *arguments], variables


def _python(name: str) -> tuple[str, dict[str, str]]:
    folder, one = root() / name, ENVIRONMENTS[name]
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "COV_"))}
    more = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    behind = [str(made(one.over))] if one.over else []
    paths = {} if one.whole or one.npm else {"PYTHONPATH": os.pathsep.join([str(folder), *behind])}
    return str(folder / "bin/python") if one.whole else sys.executable, kept | more | paths


def _make(name: str, one: Environment, folder: Path) -> None:
    if one.npm is not None:
        _unpack(name, one.npm, folder)
    elif one.whole:
        _installed(name, folder)
    else:
        _run(name, sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder), *one.packages)
    if one.source is not None:
        _copy_sources(name, one.source, folder)


def _try(name: str, one: Environment) -> None:
    """Import what the environment is for."""
    if one.proof is not None:
        python, variables = _python(name)
        _run(name, python, "-c", f"import {one.proof}", variables=variables)


def _installed(name: str, folder: Path) -> None:
    try:
        installed(folder)
    except subprocess.CalledProcessError as error:
        raise _failed(name, error.cmd, error.returncode, "") from error


def _unpack(name: str, package: str, folder: Path) -> None:
    _run(name, "npm", "pack", "--silent", package, "--pack-destination", str(folder))
    archive = next(folder.glob("*.tgz"))
    with tarfile.open(archive) as opened:
        opened.extractall(folder, filter="data")
    archive.unlink()


def _copy_sources(name: str, package: str, folder: Path) -> None:
    """Put the packages of a source distribution, and what it says of itself, into a folder."""
    pip = (sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", ":all:", "--no-build-isolation")
    with tempfile.TemporaryDirectory() as scratch:
        _run(name, *pip, "-d", scratch, package)
        with tarfile.open(next(Path(scratch).glob("*.tar.gz"))) as opened:
            opened.extractall(scratch, filter="data")
        (unpacked,) = (each for each in Path(scratch).iterdir() if each.is_dir())
        for inside in unpacked.iterdir():
            if (inside / "__init__.py").is_file() or inside.suffix == ".egg-info":
                shutil.copytree(inside, folder / inside.name)


def _run(name: str, *words: str, variables: dict[str, str] | None = None) -> None:
    try:
        done = subprocess.run(words, check=False, capture_output=True, text=True, env=variables)
    except FileNotFoundError as error:
        raise _failed(name, words, 127, str(error)) from error
    if done.returncode:
        raise _failed(name, words, done.returncode, done.stderr)


def _failed(name: str, words: Sequence[object], status: int, said: str) -> DataError:
    lines = [line for line in said.strip().splitlines() if not line.startswith("WARNING")]
    return DataError(
        where=f"environment {name} in {root()}",
        given="\n".join([f"`{' '.join(map(str, words))}` ended with status {status}", *lines[-_LINES:]]),
        allowed=f"what tests/readers/environments.py lists of {name}, installed from pip's or npm's index",
        do="check the network and the index settings, then start again: what is whole stays",
    )


def _size(folder: Path) -> float:
    """Return the size of a folder in MB."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink()) / 1e6


def main(names: Sequence[str]) -> int:
    """Make environments, and say what became of each; return 1 where one failed."""
    failed = 0
    for name in names or ENVIRONMENTS:
        began = time.monotonic()
        try:
            folder = made(name)
            print(f"{name}: {folder}, {_size(folder):,.0f} MB, {time.monotonic() - began:.0f} s", flush=True)
        except EqatError as error:
            print(f"{name}: failed\n{error}", file=sys.stderr, flush=True)
            failed = 1
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
