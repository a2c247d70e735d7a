"""Is this folder a whole, unaltered checkpoint of ours? Its manifest says."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path

from eqat_mm.blocks.config import CONFIG
from eqat_mm.blocks.stored import INDEX, SINGLE
from eqat_mm.checkpoint.companions import DECIDING, files_like
from eqat_mm.checkpoint.manifest import ADAPTER, MANIFEST, Manifest, is_local, read_manifest
from eqat_mm.errors import CheckpointError
from eqat_mm.runtime.files import read_json_object, sha256_of


def verify_checkpoint(folder: Path) -> Manifest:
    """Check that every file that decides the model has its SHA-256 in the manifest, and has it still.

    Of what older manifests do not notice a warning says that it is not checked.

    Returns:
        The manifest.

    Raises:
        CheckpointError: a file is missing, truncated, altered, or not in the manifest.
    """
    manifest = verify_all_but_weights(folder)
    _require_hashes(folder, {name: digest for name, digest in manifest.files.items() if _is_weights(name)})
    if manifest.unnoticed is not None:
        warnings.warn(
            f"{folder / MANIFEST} is of version {manifest.format_version}: {manifest.unnoticed} cannot be checked",
            stacklevel=2,
        )
    return manifest


def verify_all_but_weights(folder: Path) -> Manifest:
    """Check what is read of a checkpoint before its weights are, and takes no time.

    Returns:
        The manifest.

    Raises:
        CheckpointError: as `verify_checkpoint`.
    """
    manifest = read_manifest(folder)
    _require_hashes(folder, {name: digest for name, digest in manifest.files.items() if not _is_weights(name)})
    for name in sorted(_must_be_listed(folder, manifest) - manifest.files.keys()):
        raise CheckpointError(
            where=f"{folder / MANIFEST}: files",
            given=f"no SHA-256 of {name}",
            allowed="the hash of every file that decides what the model computes",
            do=f"if {name} was put there later, take it away again; else copy or make the checkpoint again",
        )
    return manifest


def _is_weights(name: str) -> bool:
    return name.endswith(".safetensors")


def _require_hashes(folder: Path, files: Mapping[str, str]) -> None:
    for name, expected in files.items():
        path = folder / name
        given = sha256_of(path) if path.is_file() else "no such file"
        if given != expected:
            raise CheckpointError(
                where=str(path),
                given=given if not path.is_file() else f"sha256 {given[:16]}...",
                allowed=f"sha256 {expected[:16]}..., as recorded in {MANIFEST}",
                do="the file was truncated or altered: copy or make the checkpoint again",
            )


def weight_map(folder: Path) -> dict[str, str]:
    """Return the shard of every stored tensor, as the index has it.

    Raises:
        CheckpointError: no index, a broken one, or a single file of weights beside it.
    """
    path = folder / INDEX
    found = read_json_object(path).get("weight_map")
    if isinstance(found, dict) and found and all(is_local(name) for name in found.values()):
        others = files_like(folder, [SINGLE]) if SINGLE not in found.values() else []
        given = f"{others[0]} beside it, which others would read in its place" if others else ""
    else:
        given = "no table of file names"
    if given:
        raise CheckpointError(
            where=f"{path}: weight_map",
            given=given,
            allowed="for every tensor the name of a file in this folder, and no other weights",
            do="take away what was put there later; else copy or make the checkpoint again",
        )
    return dict(found or {})


def _must_be_listed(folder: Path, manifest: Manifest) -> set[str]:
    names = set(weight_map(folder).values()) | set(files_like(folder, [f"{ADAPTER}/*.safetensors"]))
    if manifest.lists_weights_only:
        return names
    return names | {CONFIG, INDEX} | set(files_like(folder, [*DECIDING, f"{ADAPTER}/*.json"]))
