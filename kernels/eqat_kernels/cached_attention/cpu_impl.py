"""Attention over a cache of integers on a CPU, in C: a row of bytes is expanded once for all queries of its head.

With 4 bits a byte holds two channels, so queries and outputs go as all even channels, then all odd ones.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from eqat_kernels.cached_attention.reference import SCALE_BYTES
from eqat_kernels.cpu_library import Cache, call

LANES = 16
"""Floats that the C source takes at a time."""


def attend(query: Tensor, keys: Tensor, values: Tensor, bits: int, mask: Tensor | None, scaling: float) -> Tensor:
    """See `eqat_kernels.cached_attention.cached_attention`."""
    batch, heads, tokens, width = keys.shape
    bytes_ = width - SCALE_BYTES
    half = bytes_ + -bytes_ % LANES
    halves = (query.float() * scaling).unflatten(-1, (bytes_, -1)).transpose(-1, -2)
    q = pad(halves, (0, half - bytes_)).reshape(batch * heads, -1, halves.shape[-2] * half)
    logits = _masked(mask, (*query.shape[:-1], tokens))
    out = torch.zeros_like(q)
    of_keys, of_values = (Cache(rows.data_ptr(), *rows.stride()[:3], bytes_, half) for rows in (keys, values))
    call("attend", bits, of_keys, of_values, q, logits, out, batch * heads, heads, q.shape[1], tokens)
    channels = out.unflatten(-1, (-1, half))[..., :bytes_].transpose(-1, -2)
    result: Tensor = channels.reshape(query.shape).to(query.dtype)
    return result


def _masked(mask: Tensor | None, shape: tuple[int, ...]) -> Tensor:
    """Return logits to which only the products are to be added."""
    logits = torch.zeros(shape)
    if mask is None:
        return logits
    if mask.dtype is torch.bool:
        return logits.masked_fill_(~mask, float("-inf"))
    return logits.add_(mask)
