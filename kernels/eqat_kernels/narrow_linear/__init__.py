"""Linear layer whose weight stays in the 16 bits of its file while everything around it is float32."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from eqat_kernels.dispatch import implementation, select
from eqat_kernels.sizes import check_narrow
from eqat_kernels.tensors import cast, product_dtype


def narrow_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, impl: str = "auto") -> Tensor:
    """Return x @ weight.T + bias, differentiable in all three; no float32 copy of a frozen weight is made.

    Every 16-bit number is a float32 number, so the product is that of the copy but for the order of its sums.

    Args:
        x: activations, float [..., I]; under autocast they are cast first.
        weight: [O, I], bfloat16 or float16.
        bias: [O] or None.
        impl: implementation, see `eqat_kernels.dispatch`.

    Returns:
        [..., O] in the dtype of `x`.

    Raises:
        ValueError: a tensor is not of this shape, or `impl` cannot run.
    """
    check_narrow(x, weight, bias)
    x = cast(x, product_dtype(x))
    bias = bias if bias is None else cast(bias, x.dtype)
    if x.dtype is not torch.float32 or weight.requires_grad or torch.compiler.is_compiling():
        return linear(x, cast(weight, x.dtype), bias)
    chosen = select("narrow_linear", impl, x)
    x_TI = x.reshape(-1, x.shape[-1])
    y: Tensor = _NarrowLinear.apply(x_TI, weight, chosen).view(*x.shape[:-1], weight.shape[0])
    return y if bias is None else y + bias


class _NarrowLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, chosen: str) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.chosen = chosen
        y: Tensor = implementation("narrow_linear", chosen).forward(x, weight)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return implementation("narrow_linear", ctx.chosen).backward(grad, *ctx.saved_tensors), None, None


__all__ = ["narrow_linear"]
