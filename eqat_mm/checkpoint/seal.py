"""The last files of a checkpoint: index and configuration, then the manifest with the hashes of all that decides it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from eqat_mm.blocks.config import CONFIG
from eqat_mm.blocks.stored import INDEX, stored_in
from eqat_mm.checkpoint.companions import DECIDING, files_like
from eqat_mm.checkpoint.manifest import ADAPTER, Manifest
from eqat_mm.checkpoint.spelling import spelled_for_all
from eqat_mm.errors import CheckpointError
from eqat_mm.runtime.files import sha256_of, write_json


def seal(
    folder: Path, shards: Sequence[Path], config: dict[str, Any], made: Manifest, digests: Mapping[Path, str]
) -> Manifest:
    """Write index and config, then the manifest with the hashes of the files.

    Raises:
        CheckpointError: a shard is missing or truncated, or is not the one that was written.
    """
    for leftover in folder.glob(".*.partial"):  # of a write that was killed
        leftover.unlink()
    weights, total = {}, 0
    for path in shards:
        weights.update({one.name: path.name for one in stored_in(path)})
        total += path.stat().st_size
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weights})
    write_json(folder / CONFIG, spelled_for_all(config))
    names = [path.name for path in shards] + [INDEX, CONFIG]
    names += files_like(folder, [*DECIDING, f"{ADAPTER}/*"])
    manifest = replace(made, files={name: _digest(folder / name, digests) for name in names})
    manifest.write(folder)
    return manifest


def _digest(path: Path, known: Mapping[Path, str]) -> str:
    found = sha256_of(path)
    if known.get(path, found) != found:
        raise CheckpointError(
            where=str(path),
            given=f"sha256 {found[:16]}...",
            allowed=f"sha256 {known[path][:16]}..., as it was written",
            do="the file was altered since: discard the run with --overwrite and start it again",
        )
    return found
