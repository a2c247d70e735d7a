"""A GGUF file: its tensors are planned first, then made and written one by one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from eqat_mm.runtime.files import atomic_path
from eqat_mm.runtime.progress import progress

F32, F16, BF16 = 0, 1, 30
"""Numbers of the types that are no blocks."""

_DTYPES = {F32: torch.float32, F16: torch.float16, BF16: torch.bfloat16}


@dataclass(frozen=True)
class Planned:
    """One tensor of a GGUF file.

    Attributes:
        name: in the file.
        shape: of its values, the innermost last.
        kind: number of its type.
        bytes: of it.
        make: returns them, uint8 of any shape.
    """

    name: str
    shape: tuple[int, ...]
    kind: int
    bytes: int
    make: Callable[[], Tensor]


def plain(name: str, shape: Sequence[int], kind: int, read: Callable[[], Tensor]) -> Planned:
    """Plan a tensor of numbers.

    Args:
        name: in the file.
        shape: of it.
        kind: one of `F32`, `F16`, `BF16`.
        read: returns it, in any floating point.
    """
    dtype = _DTYPES[kind]
    size = int(np.prod(shape)) * dtype.itemsize
    return Planned(name, tuple(shape), kind, size, lambda: read().to(dtype).contiguous().view(torch.uint8))


def write_file(path: Path, arch: str, keys: dict[str, Any], tensors: Sequence[Planned]) -> None:
    """Write a GGUF file, a tensor in memory at a time.

    Args:
        path: of the file.
        arch: of llama.cpp.
        keys: key -> value, of Python's types: see `_add`.
        tensors: in the order of the file.
    """
    writer = import_module("gguf").GGUFWriter(None, arch)
    for key, value in keys.items():
        _add(writer, key, value)
    for one in tensors:  # the dtype counts only where the type is left open; the package need not know its number
        writer.add_tensor_info(one.name, one.shape, np.dtype(np.float32), one.bytes, one.kind)
    with atomic_path(path) as temporary:
        writer.write_header_to_file(temporary)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for one in progress(tensors, what=f"write {path.name}", total=len(tensors), unit="tensor"):
            writer.write_tensor_data(one.make().contiguous().numpy())
        writer.close()


def _add(writer: Any, key: str, value: Any) -> None:
    """Add a key: text, a truth value, an unsigned whole number, a single-precision one, or a list of one of these."""
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    add.get(type(value), writer.add_array)(key, value)
