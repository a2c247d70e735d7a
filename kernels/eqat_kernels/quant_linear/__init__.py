"""Linear layer on packed weights, trainable in its step sizes."""

from __future__ import annotations

import torch
from torch import Tensor

from eqat_kernels.dispatch import select
from eqat_kernels.packing import PackedLayout
from eqat_kernels.quant_linear import reference

_RUN = {"reference": reference.quant_linear}


def quant_linear(
    x: Tensor,
    words: Tensor,
    scale: Tensor,
    zero_words: Tensor | None,
    layout: PackedLayout,
    bias: Tensor | None = None,
    *,
    impl: str = "auto",
) -> Tensor:
    """Return x @ W_hat.T + bias; differentiable in `x`, `scale` and `bias`.

    Between forward and backward only `x` and the packed integers are kept; the backward rebuilds the dense
    weight of this one layer.

    Args:
        x: activations, float [..., I]; under autocast they are cast first.
        words: packed codes, int32 [O, ceil(I*N/32)].
        scale: s, float [O, G].
        zero_words: packed zero points, int32 [ceil(O*N/32), G], or None (symmetric).
        layout: shape and bit width.
        bias: [O] or None.
        impl: implementation, see `eqat_kernels.dispatch`.

    Returns:
        [..., O] in the dtype of `x`.
    """
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    return _RUN[select("quant_linear", impl, x)](x, words, scale, zero_words, layout, bias)


__all__ = ["quant_linear"]
