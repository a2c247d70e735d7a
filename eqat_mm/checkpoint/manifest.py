"""The manifest `eqat.json`: what a checkpoint says of itself."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from eqat_mm.errors import CheckpointError, EqatError
from eqat_mm.quant.bit_widths import UNQUANTIZED, BitWidths
from eqat_mm.quant.spec import QuantSpec
from eqat_mm.runtime.files import read_json_object
from eqat_mm.runtime.sealed import SEAL, is_as_sealed, without_seal, write_sealed

MANIFEST = "eqat.json"
ADAPTER = "adapter"
"""Folder of low-rank adapters inside a checkpoint."""

_FORMAT_VERSION = 3
_WEIGHTS_ONLY, _NOT_SEALED = 1, 2
_UNNOTICED = {_WEIGHTS_ONLY: f"{MANIFEST} and files other than weights", _NOT_SEALED: MANIFEST}
"""Older format versions, which are read, too: what may be altered without being noticed."""

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

    @property
    def unnoticed(self) -> str | None:
        """What may be altered in the checkpoint without being noticed; None in manifests of today's version."""
        return _UNNOTICED.get(self.format_version)

    @property
    def lists_weights_only(self) -> bool:
        """Whether other files are not in `files`."""
        return self.format_version == _WEIGHTS_ONLY

    def renewed(self) -> Manifest:
        """Return the manifest in the version of today, for a checkpoint that is written again."""
        return replace(self, format_version=_FORMAT_VERSION)

    def write(self, folder: Path) -> None:
        """Write the manifest, with its own hash; the checkpoint exists from here on."""
        write_sealed(folder / MANIFEST, asdict(self))


def checkpoint_folder(folder: Path) -> Path:
    """Return the folder of a checkpoint: itself, `model` in the folder of a run, or that of the only run in a folder.

    Raises:
        CheckpointError: there are several runs in it.
    """
    found = [path for path in (folder, folder / "model") if (path / MANIFEST).is_file()]
    if found or (folder / "config.json").is_file():
        return (*found, folder)[0]
    runs = sorted(path.parent for path in folder.glob(f"[!.]*/model/{MANIFEST}"))
    if len(runs) > 1:
        raise CheckpointError(
            where=str(folder),
            given=f"{len(runs)} runs: {', '.join(run.parent.name for run in runs)}",
            allowed="a checkpoint, a run, or a folder with one run",
            do=f"name one of them, such as {runs[-1].parent}",
        )
    return (*runs, folder)[0]


def read_manifest(folder: Path) -> Manifest:
    """Return the manifest of a checkpoint.

    Raises:
        CheckpointError: not a folder, not a checkpoint of ours, or an unfinished one; or the manifest was altered.
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
        stored = read_json_object(path)
    except CheckpointError as error:
        raise _unreadable(path, error.given) from error
    if SEAL in stored and not is_as_sealed(stored):
        raise CheckpointError(
            where=str(path),
            given="other content than was written",
            allowed=f"the manifest whose SHA-256 is the one in it ({SEAL})",
            do="the file was altered: copy or make the checkpoint again",
        )
    try:
        manifest = Manifest(**without_seal(stored))
        _require_fields(manifest, sealed=SEAL in stored)
    except (ValueError, TypeError, KeyError, EqatError) as error:
        reason = f"{error.where}: {error.given}" if isinstance(error, EqatError) else f"{type(error).__name__}: {error}"
        raise _unreadable(path, " ".join(reason.split())[:200]) from error
    return manifest


def _unreadable(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(
        where=str(path),
        given=f"unreadable manifest ({reason})",
        allowed=f"JSON of format version {_WEIGHTS_ONLY} to {_FORMAT_VERSION}",
        do="make the checkpoint again, or update eqat-mm if it was made by a newer version",
    )


def _require_fields(manifest: Manifest, *, sealed: bool) -> None:
    """Check every field.

    Raises:
        EqatError, TypeError, ValueError: one that cannot be.
    """
    for field, kind in _FIELDS.items():
        given = getattr(manifest, field)
        if not isinstance(given, kind) or isinstance(given, bool):
            raise TypeError(f"{field} is {given!r:.60}")
    if manifest.format_version not in (*_UNNOTICED, _FORMAT_VERSION):
        raise ValueError(f"format version {manifest.format_version}")
    if manifest.unnoticed is None and not sealed:
        raise ValueError(f"no {SEAL}")
    if manifest.auto_class not in (None, *_AUTO_CLASSES):
        raise ValueError(f"auto_class is {manifest.auto_class!r:.60}")
    if not manifest.provenance or not all(isinstance(stage, dict) for stage in manifest.provenance):
        raise ValueError("provenance without a stage")
    if not all(is_local(name) and _is_sha256(value) for name, value in manifest.files.items()):
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


def is_local(name: Any) -> bool:
    """Whether a name is that of a file in the folder, or in one below."""
    if not isinstance(name, str) or not 0 < len(name.encode("utf-8", "replace")) < 256 or "\0" in name:
        return False
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts


def _is_sha256(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None
