"""Quantize and dequantize in one differentiable op, alone and with the product that follows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from eqat_kernels.dispatch import implementation, select
from eqat_kernels.fake_quant import traced
from eqat_kernels.sizes import check_grid
from eqat_kernels.tensors import bias_gradient, cast, product_dtype


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

    Raises:
        ValueError: sizes or dtypes that do not fit one another, or `impl` cannot run.
    """
    check_grid(weight, scale, zero_point, bits)
    dtype = dtype or product_dtype(weight)
    if torch.compiler.is_compiling():
        return traced.fake_quantize(weight, scale, zero_point, bits, dtype, impl)  # type: ignore[no-any-return]
    chosen = select("fake_quantize", impl, weight)
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
        weight = ctx.saved_tensors[0]
        grad_w = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
        run = implementation("fake_quantize", ctx.chosen).backward
        grad_s, grad_z, _ = run(grad, *ctx.saved_tensors, ctx.bits, grad_w, remake=False)
        return grad_w, grad_s, grad_z, None, None, None


def fake_quant_linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    bits: int,
    bias: Tensor | None = None,
    *,
    impl: str = "auto",
) -> Tensor:
    """Return x @ W_hat.T + bias, differentiable in all five tensors: `fake_quantize` and the product in one op.

    W_hat lives in a product only: the backward makes it again on its way through W, in the same pass, and dW is
    written over dW_hat. So between forward and backward there is no copy of W, and after it no second gradient. Under
    torch.compile it is `fake_quantize` and a product, and W_hat is kept.

    Args:
        x: activations, float [..., I]; under autocast they are cast first.
        weight: W, float [O, I].
        scale: s, float [O, G].
        zero_point: z, float [O, G].
        bits: N.
        bias: [O] or None.
        impl: implementation of `fake_quantize`; products are torch's.

    Returns:
        [..., O] in the dtype of `x`.

    Raises:
        ValueError: sizes or dtypes that do not fit one another, or `impl` cannot run.
    """
    check_grid(weight, scale, zero_point, bits)
    x = cast(x, product_dtype(x)).contiguous()  # torch's bfloat16 product may read beyond the rows of a view
    if torch.compiler.is_compiling():
        w_hat = traced.fake_quantize(weight, scale, zero_point, bits, x.dtype, impl)
        return torch.nn.functional.linear(x, w_hat, None if bias is None else bias.to(x.dtype))
    chosen = select("fake_quantize", impl, weight)
    y: Tensor = _FakeQuantLinear.apply(x, weight, scale, zero_point, bias, bits, chosen)
    return y


class _FakeQuantLinear(torch.autograd.Function):
    """Keeps the inputs and nothing else."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        scale: Tensor,
        zero_point: Tensor,
        bias: Tensor | None,
        bits: int,
        chosen: str,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, scale, zero_point)
        ctx.bits, ctx.chosen = bits, chosen
        ctx.bias_dtype = None if bias is None else bias.dtype
        w_hat = implementation("fake_quantize", chosen).forward(weight, scale, zero_point, bits, x.dtype)
        return torch.nn.functional.linear(x, w_hat, None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale, zero_point = ctx.saved_tensors
        grad_TO, wanted = grad.contiguous().view(-1, grad.shape[-1]), ctx.needs_input_grad
        grad_hat = grad_TO.T @ x.view(-1, x.shape[-1])
        grad_w = grad_hat if grad_hat.dtype is weight.dtype else torch.empty_like(grad_hat, dtype=weight.dtype)
        run = implementation("fake_quantize", ctx.chosen).backward
        grad_s, grad_z, w_hat = run(grad_hat, weight, scale, zero_point, ctx.bits, grad_w, remake=wanted[0])
        grad_x = (grad_TO @ w_hat).view(x.shape) if wanted[0] else None
        grad_b = bias_gradient(grad_TO, ctx.bias_dtype) if wanted[4] else None
        return grad_x, grad_w, grad_s, grad_z, grad_b, None, None


__all__ = ["fake_quant_linear", "fake_quantize"]
