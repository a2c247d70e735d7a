"""Attention over a cache of integers in torch: expand all of it, then torch's own attention."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

SCALE_DTYPE = torch.bfloat16
SCALE_BYTES = SCALE_DTYPE.itemsize


def attend(query: Tensor, keys: Tensor, values: Tensor, bits: int, mask: Tensor | None, scaling: float) -> Tensor:
    """See `eqat_kernels.cached_attention.cached_attention`."""
    expanded = (unpack_rows(rows, bits, query.dtype) for rows in (keys, values))
    k, v = (states.repeat_interleave(query.shape[1] // keys.shape[1], dim=1) for states in expanded)
    return functional.scaled_dot_product_attention(query, k, v, attn_mask=mask, scale=scaling)


def unpack_rows(rows: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """Return keys or values [..., D] in `dtype` from their rows of bytes."""
    unsigned = rows[..., :-SCALE_BYTES]
    if bits == 4:
        unsigned = _halves(unsigned)
    # bfloat16 holds code and alpha as they are, and rounds their product once, as float32 does on its way to bfloat16
    wide = dtype if dtype in (torch.float64, torch.bfloat16) else torch.float32
    # a copy: `contiguous` would keep odd strides of dimensions of size one and odd offsets, which `view` refuses
    scale = rows[..., -SCALE_BYTES:].clone(memory_format=torch.contiguous_format).view(SCALE_DTYPE).to(wide)
    return unsigned.to(wide).sub_(1 << (bits - 1)).mul_(scale).to(dtype)


def _halves(packed: Tensor) -> Tensor:
    """Return the low and the high half of every byte in turn: moved apart to the two bytes of a 16-bit number."""
    pairs = packed.to(torch.int16, memory_format=torch.contiguous_format)
    return pairs.bitwise_or_(pairs << 4).bitwise_and_(0x0F0F).view(torch.uint8)
