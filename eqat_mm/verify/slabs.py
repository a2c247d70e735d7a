"""Tensors of safetensors files, read with numpy alone."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

_TYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4", "U32": "<u4"}
_TYPES |= {"I16": "<i2", "I8": "i1", "U8": "u1", "BOOL": "?"}


@dataclass(frozen=True)
class Slab:
    """One tensor in a file.

    Attributes:
        name: what the file calls it.
        path: of the file.
        dtype: as safetensors writes it.
        shape: its sizes.
        start: first byte in the file.
    """

    name: str
    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int

    def stored(self) -> Array:
        """Return it as it is stored, bfloat16 as the two bytes of each number; mapped, not read."""
        kind = np.dtype(_TYPES[self.dtype])
        if 0 in self.shape:
            return np.zeros(self.shape, kind)
        return np.memmap(self.path, kind, "r", self.start, self.shape or (1,)).reshape(self.shape)

    def numbers(self) -> NDArray[np.float32]:
        """Return floating-point numbers in float32, exactly."""
        stored = self.stored()
        if self.dtype == "BF16":
            return (stored.astype(np.uint32) << 16).view(np.float32)
        return stored.astype(np.float32)


def slabs_in(path: Path) -> dict[str, Slab]:
    """Return the tensors of a file by name.

    Raises:
        ValueError: no safetensors file, or a truncated one; the message names it.
    """
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            entries = json.loads(file.read(length))
        entries.pop("__metadata__", None)
        found = {name: _slab(path, name, entry, 8 + length) for name, entry in entries.items()}
    except (OSError, ValueError, KeyError, struct.error, MemoryError, OverflowError) as error:
        raise ValueError(f"{path.name} is no whole safetensors file ({type(error).__name__})") from error
    return found


def _slab(path: Path, name: str, entry: dict[str, Any], begin: int) -> Slab:
    start, end = entry["data_offsets"]
    shape = tuple(entry["shape"])
    size = int(np.prod(shape, dtype=np.int64)) * np.dtype(_TYPES[entry["dtype"]]).itemsize
    if end - start != size or begin + end > path.stat().st_size:
        raise ValueError("shape and size differ")
    return Slab(name, path, entry["dtype"], shape, begin + start)
