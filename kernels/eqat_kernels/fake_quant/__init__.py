"""Quantize and dequantize in one differentiable op."""

from __future__ import annotations

from torch import Tensor

from eqat_kernels.dispatch import select
from eqat_kernels.fake_quant import reference

_RUN = {"reference": reference.fake_quantize}


def fake_quantize(weight: Tensor, scale: Tensor, zero_point: Tensor, bits: int, *, impl: str = "auto") -> Tensor:
    """Return the quantized-then-dequantized weight, differentiable in all three tensors.

    Args:
        weight: W, float [O, I].
        scale: s, float [O, G]; group size is I / G.
        zero_point: z, float [O, G]; rounded in the forward, straight-through in the backward.
        bits: N.
        impl: implementation, see `eqat_kernels.dispatch`.

    Returns:
        W_hat, float [O, I], eqs. 1 and 2 of EfficientQAT (arXiv 2407.11062).
    """
    return _RUN[select("fake_quantize", impl, weight)](weight, scale, zero_point, bits)


__all__ = ["fake_quantize"]
