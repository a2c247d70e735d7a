"""W_hat = (W_int - z) * s (eq. 2 of EfficientQAT), from packed codes, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from eqat_kernels.layout import PackedLayout
from eqat_kernels.packing.reference import unpack


def dequantize(
    words: Tensor, scale: Tensor, zero_words: Tensor | None, layout: PackedLayout, dtype: torch.dtype
) -> Tensor:
    """See `eqat_kernels.dequantize`."""
    c_OGg = centred_codes(words, zero_words, layout, dtype)
    weight: Tensor = c_OGg.mul_(scale.to(dtype).unsqueeze(-1)).flatten(1)
    return weight


def centred_codes(words: Tensor, zero_words: Tensor | None, layout: PackedLayout, dtype: torch.dtype) -> Tensor:
    """Return W_int - z, [O, G, g] of `dtype`: the derivative of W_hat with respect to s."""
    codes_OI = unpack(words, layout.bits, layout.in_features)
    c_OGg = codes_OI.to(dtype).unflatten(1, (layout.groups, layout.group_size))
    centred: Tensor = c_OGg.sub_(zero_points(zero_words, layout, words.device).to(dtype).unsqueeze(-1))
    return centred


def zero_points(zero_words: Tensor | None, layout: PackedLayout, device: torch.device) -> Tensor:
    """Return z as uint8 [O, G]."""
    if zero_words is None:
        middle = 1 << (layout.bits - 1)
        return torch.full((layout.out_features, layout.groups), middle, dtype=torch.uint8, device=device)
    return unpack(zero_words.T, layout.bits, layout.out_features).T
