"""Is this folder a whole, unaltered checkpoint of ours? Its manifest `eqat.json` says."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from eqat_mm.errors import CheckpointError
from eqat_mm.quant.bit_widths import UNQUANTIZED, BitWidths
from eqat_mm.runtime.files import read_json, sha256_of, write_json

MANIFEST = "eqat.json"
_FORMAT_VERSION = 1


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint says of itself; written last, so a folder without it is unfinished.

    Attributes:
        arch: adapter name.
        spec: fields of the `QuantSpec`.
        stage: what made it, `round-to-nearest`, `block-ap`, `e2e-qp`, `lora`, `projector` or `llm-qat`.
        source: the full-precision model it was made from.
        files: SHA-256 of every weight file.
        provenance: command, configuration, seed and versions of every stage, first to last.
        activation_bits: of the inputs of quantized linears; 16 for floating point.
        kv_cache_bits: of keys and values; 16 for floating point.
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
    format_version: int = _FORMAT_VERSION

    @property
    def widths(self) -> BitWidths:
        """Bits of weights, activations and KV cache."""
        return BitWidths(self.spec["bits"], self.activation_bits, self.kv_cache_bits)

    def write(self, folder: Path) -> None:
        """Write the manifest; the checkpoint exists from here on."""
        write_json(folder / MANIFEST, asdict(self))


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
        if manifest.format_version != _FORMAT_VERSION:
            raise ValueError(f"format version {manifest.format_version}")
    except (ValueError, TypeError) as error:
        raise CheckpointError(
            where=str(path),
            given=f"unreadable manifest ({error})",
            allowed=f"JSON of format version {_FORMAT_VERSION}",
            do="make the checkpoint again, or update eqat-mm if it was made by a newer version",
        ) from error
    return manifest


def verify_checkpoint(folder: Path) -> Manifest:
    """Check that every weight file is there and has the recorded SHA-256; return the manifest.

    Raises:
        CheckpointError: a file is missing, truncated or altered.
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
    return manifest
