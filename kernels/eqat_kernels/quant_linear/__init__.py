"""Linear layer on packed weights, trainable in its step sizes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from eqat_kernels.dispatch import implementation, select
from eqat_kernels.layout import PackedLayout
from eqat_kernels.quant_linear import traced
from eqat_kernels.sizes import check_packed, check_product
from eqat_kernels.tensors import bias_gradient, cast, product_dtype


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

    Between forward and backward only `x` and the packed integers are kept.

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

    Raises:
        ValueError: a tensor is not what the layout says, or `impl` cannot run.
    """
    check_packed(words, scale, zero_words, layout)
    check_product(x, bias, words, layout)
    x = cast(x, product_dtype(x))
    x_TI = x.reshape(-1, x.shape[-1])
    y_TO: Tensor
    if torch.compiler.is_compiling():
        y_TO = traced.quant_linear(x_TI, words, scale, zero_words, bias, *layout.numbers, impl)
        return y_TO.view(*x.shape[:-1], layout.out_features)
    chosen = select("quant_linear", impl, x, layout=layout)
    if torch.is_grad_enabled():
        y_TO = _QuantLinear.apply(x_TI, words, scale, zero_words, layout, bias, chosen)
    else:
        y_TO = implementation("quant_linear", chosen).forward(x_TI, words, scale, zero_words, layout, bias)
    return y_TO.view(*x.shape[:-1], layout.out_features)


class _QuantLinear(torch.autograd.Function):
    """Wires an implementation, a module with `forward` and `backward`, to autograd."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        words: Tensor,
        scale: Tensor,
        zero_words: Tensor | None,
        layout: PackedLayout,
        bias: Tensor | None,
        chosen: str,
    ) -> Tensor:
        ctx.save_for_backward(x, words, scale, zero_words)
        ctx.layout, ctx.chosen = layout, chosen
        ctx.bias_dtype = None if bias is None else bias.dtype
        y: Tensor = implementation("quant_linear", chosen).forward(x, words, scale, zero_words, layout, bias)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        wanted = (ctx.needs_input_grad[0], ctx.needs_input_grad[2])
        run = implementation("quant_linear", ctx.chosen).backward
        grad_x, grad_s = run(grad, *ctx.saved_tensors, ctx.layout, wanted)
        grad_b = bias_gradient(grad, ctx.bias_dtype) if ctx.needs_input_grad[5] else None
        return grad_x, None, grad_s, None, None, grad_b, None


__all__ = ["quant_linear"]
