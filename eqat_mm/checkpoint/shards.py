"""Shards: safetensors files, written at once and described by their headers.

They are written here, because the library would make a temporary file of its own beside the shard, which a kill leaves
there for ever, and which only the owner may read. The bytes are the library's.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from eqat_mm.checkpoint.layout import SCALE_SUFFIX
from eqat_mm.errors import ConfigError
from eqat_mm.runtime.files import atomic_path

DTYPES = {
    **{"F64": torch.float64, "I64": torch.int64, "F32": torch.float32, "I32": torch.int32, "U32": torch.uint32},
    **{"F16": torch.float16, "BF16": torch.bfloat16, "I16": torch.int16},
    **{"I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool},
}
"""Name in a header -> dtype."""

_CODES = {dtype: code for code, dtype in DTYPES.items()}
_ORDER = ("I64", "F64", "F32", "U32", "I32", "BF16", "F16", "I16", "I8", "U8", "BOOL")
"""The widest first, so that every tensor is aligned; within a width the library's own order."""


class Header(NamedTuple):
    """What a file says of a tensor.

    Attributes:
        dtype: None where it is one that no checkpoint of ours has.
        shape: of the tensor.
    """

    dtype: torch.dtype | None
    shape: tuple[int, ...]


def save_shard(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write one safetensors file atomically; return its SHA-256.

    Raises:
        ConfigError: step sizes that are not finite.
    """
    _require_finite(tensors)
    names = sorted(tensors, key=lambda name: (_ORDER.index(_CODES[tensors[name].dtype]), name))
    digest = hashlib.sha256()
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        for chunk in _chunks({name: tensors[name] for name in names}):
            digest.update(chunk)
            file.write(chunk)
    return digest.hexdigest()


def _chunks(tensors: Mapping[str, Tensor]) -> Iterator[Any]:
    """Yield the bytes of a file, a tensor at a time."""
    yield _header(tensors)
    for tensor in tensors.values():
        yield tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data


def _header(tensors: Mapping[str, Tensor]) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        entries[name] = {
            "dtype": _CODES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _require_finite(tensors: Mapping[str, Tensor]) -> None:
    """Check the step sizes of a shard.

    Raises:
        ConfigError: names the layer.
    """
    for name, tensor in tensors.items():
        bad = 0 if not name.endswith(SCALE_SUFFIX) else int((~tensor.isfinite()).sum())
        if bad:
            raise ConfigError(
                where=name.removesuffix(SCALE_SUFFIX),
                given=f"{bad} of {tensor.numel()} step sizes that are not finite in {tensor.dtype}",
                allowed=f"finite step sizes, up to {torch.finfo(tensor.dtype).max:.3g}",
                do="choose --quant.scale_dtype bfloat16; if it is chosen, look for NaN in the weights of this layer",
            )
