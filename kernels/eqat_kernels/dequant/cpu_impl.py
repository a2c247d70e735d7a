"""W_hat = (W_int - z) * s in C, from the packed words to the dense weight in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from eqat_kernels.cpu_library import call, packed, weight_dtype
from eqat_kernels.layout import PackedLayout
from eqat_kernels.tensors import cast


def dequantize(
    words: Tensor, scale: Tensor, zero_words: Tensor | None, layout: PackedLayout, dtype: torch.dtype
) -> Tensor:
    """See `eqat_kernels.dequantize`."""
    return dequantize_rows(words, scale, zero_words, layout, dtype, range(layout.out_features))


def dequantize_rows(
    words: Tensor,
    scale: Tensor,
    zero_words: Tensor | None,
    layout: PackedLayout,
    dtype: torch.dtype,
    rows: range,
) -> Tensor:
    """Return some rows of W_hat, [len(rows), I]."""
    words, scale, zeros = words.contiguous(), cast(scale, torch.float32).contiguous(), contiguous(zero_words)
    weight = torch.empty(len(rows), layout.in_features, dtype=weight_dtype(dtype))
    call("dequantize", layout.bits, packed(words, zeros, layout, rows), scale, weight, weight.dtype is torch.bfloat16)
    return cast(weight, dtype)


def contiguous(zero_words: Tensor | None) -> Tensor | None:
    """Return the zero points one row after another; None on the symmetric grid."""
    return None if zero_words is None else zero_words.contiguous()
