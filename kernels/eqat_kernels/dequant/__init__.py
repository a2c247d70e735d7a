"""Packed codes to a dense weight."""

from __future__ import annotations

import torch
from torch import Tensor

from eqat_kernels.dequant import traced
from eqat_kernels.dispatch import implementation, select
from eqat_kernels.layout import PackedLayout
from eqat_kernels.sizes import check_packed


def dequantize(
    words: Tensor,
    scale: Tensor,
    zero_words: Tensor | None,
    layout: PackedLayout,
    dtype: torch.dtype = torch.float32,
    *,
    impl: str = "auto",
) -> Tensor:
    """Return the dense weight of a packed one.

    Args:
        words: packed codes, int32 [O, ceil(I*N/32)].
        scale: s, float [O, G].
        zero_words: zero points packed along the output rows, int32 [ceil(O*N/32), G]; None for the symmetric
            grid, whose zero point is 2^(N-1).
        layout: shape and bit width.
        dtype: of the result.
        impl: implementation, see `eqat_kernels.dispatch`.

    Returns:
        W_hat, [O, I].

    Raises:
        ValueError: a tensor is not what the layout says, or `impl` cannot run.
    """
    weight: Tensor
    check_packed(words, scale, zero_words, layout)
    if torch.compiler.is_compiling():
        weight = traced.dequantize(words, scale, zero_words, dtype, *layout.numbers, impl)
        return weight
    chosen = select("dequantize", impl, words, dtype=dtype, layout=layout)
    weight = implementation("dequantize", chosen).dequantize(words, scale, zero_words, layout, dtype)
    return weight


__all__ = ["dequantize"]
