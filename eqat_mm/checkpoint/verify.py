"""Is this folder a whole, unaltered checkpoint of ours? Its manifest `eqat.json` says."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from eqat_mm.blocks.source import INDEX
from eqat_mm.checkpoint.companions import DECIDING, files_like
from eqat_mm.errors import CheckpointError, EqatError
from eqat_mm.quant.bit_widths import UNQUANTIZED, BitWidths
from eqat_mm.quant.spec import QuantSpec
from eqat_mm.runtime.files import read_json, sha256_of, write_json

MANIFEST = "eqat.json"
CONFIG = "config.json"
ADAPTER = "adapter"
"""Folder of low-rank adapters inside a checkpoint."""

_FORMAT_VERSION = 2
_HASHES_WEIGHTS_ONLY = 1
"""Format version of manifests that name weight files and nothing else; they are read, too."""

_AUTO_CLASSES = ("AutoModelForCausalLM", "AutoModelForImageTextToText")


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint says of itself; written last, so a folder without it is unfinished.

    Attributes:
        arch: adapter name.
        spec: fields of the `QuantSpec`.
        stage: what made it, `round-to-nearest`, `block-ap`, `e2e-qp`, `lora`, `projector` or `llm-qat`.
        source: the full-precision model it was made from.
        files: SHA-256 of every file that decides what the model computes: weights, index, configuration, tokenizer,
            processor, chat templates, generation settings, adapters.
        provenance: command, configuration, seed and versions of every stage, first to last.
        activation_bits: of the inputs of quantized linears; 16 for floating point.
        kv_cache_bits: of keys and values; 16 for floating point.
        auto_class: transformers class that built the full-precision model, and builds this one; None in manifests of
            version 1.
        format_version: of this manifest.
    """

    arch: str
    spec: dict[str, Any]
    stage: str
    source: str
    files: dict[str, str]
    provenance: list[dict[str, Any]]
    activation_bits: int = UNQUANTIZED
    kv_cache_bits: int = UNQUANTIZED
    auto_class: str | None = None
    format_version: int = _FORMAT_VERSION

    @property
    def widths(self) -> BitWidths:
        """Bits of weights, activations and KV cache."""
        return BitWidths(self.spec["bits"], self.activation_bits, self.kv_cache_bits)

    @property
    def has_adapters(self) -> bool:
        """Whether low-rank adapters lie beside the weights."""
        return any(name.startswith(f"{ADAPTER}/") for name in self.files)

    def renewed(self) -> Manifest:
        """Return the manifest in the version of today, for a checkpoint that is written again."""
        return replace(self, format_version=_FORMAT_VERSION)

    def write(self, folder: Path) -> None:
        """Write the manifest; the checkpoint exists from here on."""
        write_json(folder / MANIFEST, asdict(self))


def checkpoint_folder(folder: Path) -> Path:
    """Return the folder of a checkpoint: itself, or `model` in the folder of a run."""
    inside = folder / "model"
    return inside if (inside / MANIFEST).is_file() and not (folder / MANIFEST).is_file() else folder


def read_manifest(folder: Path) -> Manifest:
    """Return the manifest of a checkpoint.

    Raises:
        CheckpointError: not a folder, not a checkpoint of ours, or an unfinished one.
    """
    path = folder / MANIFEST
    if not path.is_file():
        found = "no such folder" if not folder.is_dir() else f"no {MANIFEST} in it"
        raise CheckpointError(
            where=str(folder),
            given=found,
            allowed="a folder written by `eqat block-ap` or `eqat e2e-qp`",
            do="check the path; an interrupted run is finished by starting the same command again",
        )
    try:
        manifest = Manifest(**read_json(path))
        _require_fields(manifest)
    except (OSError, ValueError, TypeError, KeyError, RecursionError, EqatError) as error:
        reason = f"{error.where}: {error.given}" if isinstance(error, EqatError) else _short(error)
        raise CheckpointError(
            where=str(path),
            given=f"unreadable manifest ({reason})",
            allowed=f"JSON of format version {_HASHES_WEIGHTS_ONLY} or {_FORMAT_VERSION}",
            do="make the checkpoint again, or update eqat-mm if it was made by a newer version",
        ) from error
    return manifest


def verify_checkpoint(folder: Path) -> Manifest:
    """Check that every file that decides the model has its SHA-256 in the manifest, and has it still.

    Manifests of version 1 name weight files only; of these checkpoints only weights are checked.

    Returns:
        The manifest.

    Raises:
        CheckpointError: a file is missing, truncated, altered, or not in the manifest.
    """
    manifest = read_manifest(folder)
    for name, expected in manifest.files.items():
        path = folder / name
        given = sha256_of(path) if path.is_file() else "no such file"
        if given != expected:
            raise CheckpointError(
                where=str(path),
                given=given if not path.is_file() else f"sha256 {given[:16]}...",
                allowed=f"sha256 {expected[:16]}..., as recorded in {MANIFEST}",
                do="the file was truncated or altered: copy or make the checkpoint again",
            )
    for name in sorted(_must_be_listed(folder, manifest) - manifest.files.keys()):
        raise CheckpointError(
            where=f"{folder / MANIFEST}: files",
            given=f"no SHA-256 of {name}",
            allowed="the hash of every file that decides what the model computes",
            do=f"if {name} was put there later, take it away again; else copy or make the checkpoint again",
        )
    return manifest


def weight_map(folder: Path) -> dict[str, str]:
    """Return the shard of every stored tensor, as the index has it.

    Raises:
        CheckpointError: no index, or a broken one.
    """
    path = folder / INDEX
    found = read_object(path).get("weight_map")
    if not isinstance(found, dict) or not found or not all(_is_local(name) for name in found.values()):
        raise CheckpointError(
            where=f"{path}: weight_map",
            given="nothing" if not found else f"{type(found).__name__} that is no table of file names",
            allowed="for every tensor the name of a file in this folder",
            do="the file was truncated or altered: copy or make the checkpoint again",
        )
    return found


def read_object(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
        CheckpointError: no such file, not JSON, or not an object.
    """
    try:
        value = read_json(path)
        given = f"a {type(value).__name__}"
    except (OSError, ValueError, RecursionError) as error:
        value, given = None, f"unreadable ({_short(error)})"
    if isinstance(value, dict):
        return value
    raise CheckpointError(
        where=str(path),
        given=given,
        allowed="a JSON object",
        do="the file is missing, truncated or altered: copy or make the checkpoint again",
    )


def _must_be_listed(folder: Path, manifest: Manifest) -> set[str]:
    names = set(weight_map(folder).values()) | set(files_like(folder, [f"{ADAPTER}/*.safetensors"]))
    if manifest.format_version == _HASHES_WEIGHTS_ONLY:
        return names
    return names | {CONFIG, INDEX} | set(files_like(folder, [*DECIDING, f"{ADAPTER}/*.json"]))


def _require_fields(manifest: Manifest) -> None:
    """Check every field.

    Raises:
        EqatError, TypeError, ValueError: one that cannot be.
    """
    for field, kind in _FIELDS.items():
        given = getattr(manifest, field)
        if not isinstance(given, kind) or isinstance(given, bool):
            raise TypeError(f"{field} is {given!r:.60}")
    if manifest.format_version not in (_HASHES_WEIGHTS_ONLY, _FORMAT_VERSION):
        raise ValueError(f"format version {manifest.format_version}")
    if manifest.auto_class not in (None, *_AUTO_CLASSES):
        raise ValueError(f"auto_class is {manifest.auto_class!r:.60}")
    if not manifest.provenance or not all(isinstance(stage, dict) for stage in manifest.provenance):
        raise ValueError("provenance without a stage")
    if not all(_is_local(name) and _is_sha256(value) for name, value in manifest.files.items()):
        raise ValueError("files is no table of names in this folder and SHA-256")
    if any(type(manifest.spec.get(field)) is not int for field in ("bits", "group_size")):
        raise TypeError(f"spec is {manifest.spec!r:.60}")
    QuantSpec(**manifest.spec)
    assert manifest.widths


_FIELDS: dict[str, type] = {
    **dict.fromkeys(("arch", "stage", "source"), str),
    **dict.fromkeys(("spec", "files"), dict),
    **dict.fromkeys(("activation_bits", "kv_cache_bits", "format_version"), int),
    "provenance": list,
}


def _is_local(name: Any) -> bool:
    if not isinstance(name, str) or not 0 < len(name.encode("utf-8", "replace")) < 256 or "\0" in name:
        return False
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts


def _is_sha256(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


def _short(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
