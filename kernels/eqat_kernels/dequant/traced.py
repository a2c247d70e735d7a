"""`dequantize` as torch.compile sees it: an op registered with torch (see `eqat_kernels.quant_linear.traced`)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from eqat_kernels.dispatch import implementation, select
from eqat_kernels.layout import PackedLayout
from eqat_kernels.sizes import check_packed


@torch.library.custom_op("eqat::dequantize", mutates_args=())
def dequantize(
    words: Tensor,
    scale: Tensor,
    zero_words: Tensor | None,
    dtype: torch.dtype,
    bits: int,
    group_size: int,
    out_features: int,
    in_features: int,
    impl: str,
) -> Tensor:
    """Return W_hat [O, I] in `dtype`; see `eqat_kernels.dequantize`."""
    layout = PackedLayout(bits, group_size, out_features, in_features)
    check_packed(words, scale, zero_words, layout)
    chosen = select("dequantize", impl, words, dtype=dtype, layout=layout)
    weight: Tensor = implementation("dequantize", chosen).dequantize(words, scale, zero_words, layout, dtype)
    return weight


@dequantize.register_fake
def _(words: Tensor, scale: Tensor, zero_words: Tensor | None, dtype: torch.dtype, *layout: Any) -> Tensor:
    out_features, in_features = layout[2:4]
    return words.new_empty(out_features, in_features, dtype=dtype)
