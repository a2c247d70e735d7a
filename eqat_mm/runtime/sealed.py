"""JSON files that notice when they were altered: the object carries the SHA-256 of the rest of itself."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from eqat_mm.errors import CheckpointError
from eqat_mm.runtime.files import read_json_object, write_json

SEAL = "sha256"
"""Name of the hash in the object."""


def write_sealed(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON object atomically, with its own hash."""
    write_json(path, value | {SEAL: _hash(value)})


def read_sealed(path: Path, *expected: str) -> dict[str, Any]:
    """Return the object that `write_sealed` wrote, with all expected names in it: not another of our files.

    Raises:
        CheckpointError: the file is missing, or holds anything else.
    """
    try:
        value = read_json_object(path)
    except CheckpointError as error:
        raise _damaged(path, error.given) from error
    if not is_as_sealed(value) or not value.keys() >= set(expected):
        raise _damaged(path, "other content than was written: altered, or of another version")
    return without_seal(value)


def is_as_sealed(value: dict[str, Any]) -> bool:
    """Whether an object carries the hash of the rest of itself."""
    try:
        return bool(value.get(SEAL) == _hash(without_seal(value)))
    except RecursionError:  # nested deeper than anything that was sealed
        return False


def without_seal(value: dict[str, Any]) -> dict[str, Any]:
    """Return the object as it was before it was sealed."""
    return {name: part for name, part in value.items() if name != SEAL}


def _damaged(path: Path, given: str) -> CheckpointError:
    return CheckpointError(
        where=str(path),
        given=given,
        allowed="the file as this version of eqat-mm wrote it",
        do="restore it, or give another --output; to begin anew there, remove the run by hand",
    )


def _hash(value: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
