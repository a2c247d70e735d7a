"""What a model folder holds, by the headers of its safetensors files: names, dtypes and shapes, no values."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from safetensors import SafetensorError, safe_open

from eqat_mm.errors import CheckpointError
from eqat_mm.runtime.files import read_json_object

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


@dataclass(frozen=True)
class Stored:
    """One tensor in a file.

    Attributes:
        name: what the file calls it.
        path: of the file.
        dtype: as safetensors writes it: F32, BF16, I8, F8_E4M3, ...
        shape: its sizes.
    """

    name: str
    path: Path
    dtype: str
    shape: tuple[int, ...]


def stored_in(path: Path) -> list[Stored]:
    """Return the tensors of one safetensors file.

    Raises:
        CheckpointError: the file is missing, truncated or not safetensors.
    """
    with open_safetensors(path) as reader:
        slices = [(name, reader.get_slice(name)) for name in reader.keys()]  # noqa: SIM118 - it is no mapping
        return [Stored(name, path, part.get_dtype(), tuple(part.get_shape())) for name, part in slices]


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a model folder, in order; as in transformers, a single file outweighs an index.

    Raises:
        CheckpointError: there are none, or the index is unreadable or names a file that is missing or elsewhere.
    """
    indexed = (folder / INDEX).is_file() and not (folder / SINGLE).is_file()
    paths = _indexed_files(folder / INDEX) if indexed else [folder / SINGLE]
    missing = [path.name for path in paths if not os.path.isfile(path)]  # unlike Path, False for impossible names
    if missing:
        raise CheckpointError(
            where=str(folder),
            given=f"missing {', '.join(missing[:3])}",
            allowed=f"a model folder with {SINGLE}, or {INDEX} and every shard it names",
            do="check the path, or make the checkpoint again",
        )
    return paths


def open_safetensors(path: Path) -> Any:
    """Open a safetensors file.

    Raises:
        CheckpointError: the file is truncated or not safetensors.
    """
    try:
        return safe_open(str(path), framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            where=str(path),
            given=f"unreadable safetensors ({error})",
            allowed="a complete safetensors file",
            do="the file was truncated or altered: download or make it again",
        ) from error


def _indexed_files(index: Path) -> list[Path]:
    """Return the files that an index names.

    What each of them holds is read from itself, as transformers does.

    Raises:
        CheckpointError: it is not an index, or names a file outside its folder.
    """
    content = read_json_object(index)
    files = content.get("weight_map")
    if not isinstance(files, dict) or not files or not isinstance(content.get("metadata"), dict):
        raise _bad_index(index, "no object `metadata`, or no tensors in `weight_map`")
    for name in files.values():
        if not isinstance(name, str) or PurePath(name).is_absolute() or ".." in PurePath(name).parts:
            raise _bad_index(index, f"the file name {name!r:.80}")
    return [index.parent / name for name in sorted(set(files.values()))]


def _bad_index(index: Path, given: str) -> CheckpointError:
    return CheckpointError(
        where=str(index),
        given=given,
        allowed='{"metadata": {...}, "weight_map": {tensor: file in this folder, ...}}',
        do="download or make the checkpoint again",
    )
