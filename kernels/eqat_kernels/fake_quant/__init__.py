"""Quantize and dequantize in one differentiable op."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from eqat_kernels.dispatch import implementation, product_dtype, select


def fake_quantize(
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    bits: int,
    *,
    dtype: torch.dtype | None = None,
    impl: str = "auto",
) -> Tensor:
    """Return the quantized-then-dequantized weight, differentiable in all three tensors.

    Args:
        weight: W, float [O, I].
        scale: s, float [O, G]; group size is I / G.
        zero_point: z, float [O, G]; rounded in the forward, straight-through in the backward.
        bits: N.
        dtype: of the result, to which it is rounded once; default: that of autocast where it is on, else of W. The
            gradients have the dtype of W.
        impl: implementation, see `eqat_kernels.dispatch`.

    Returns:
        W_hat, float [O, I], eqs. 1 and 2 of EfficientQAT (arXiv 2407.11062).
    """
    chosen = select("fake_quantize", impl, weight)
    dtype = dtype or product_dtype(weight)
    return _FakeQuantize.apply(weight, scale, zero_point, bits, dtype, chosen)  # type: ignore[no-any-return]


class _FakeQuantize(torch.autograd.Function):
    """Keeps the inputs and nothing else; an implementation is a module with `forward` and `backward`."""

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, scale: Tensor, zero_point: Tensor, bits: int, dtype: torch.dtype, chosen: str
    ) -> Tensor:
        ctx.save_for_backward(weight, scale, zero_point)
        ctx.bits, ctx.chosen = bits, chosen
        result: Tensor = implementation("fake_quantize", chosen).forward(weight, scale, zero_point, bits, dtype)
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        run = implementation("fake_quantize", ctx.chosen).backward
        return (*run(grad, *ctx.saved_tensors, ctx.bits), None, None, None)


__all__ = ["fake_quantize"]
