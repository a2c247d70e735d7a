"""The packed linear layer as torch.compile sees it: two ops registered with torch, whose inside it never looks into.

Which implementation runs is decided when the op runs, not when it is traced. With gradients torch takes twice as long
to call an op as the layer's own autograd function, so nothing but a trace goes through here.

Shape letters: T tokens, I inputs, O outputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from eqat_kernels.dispatch import implementation, select
from eqat_kernels.layout import PackedLayout
from eqat_kernels.sizes import check_gradient, check_packed, check_product
from eqat_kernels.tensors import bias_gradient

_PACKED = "Tensor words, Tensor scale, Tensor? zero_words"
_LAYOUT = "int bits, int group_size, int out_features, int in_features, str impl"


@torch.library.custom_op(
    "eqat::quant_linear", mutates_args=(), schema=f"(Tensor x, {_PACKED}, Tensor? bias, {_LAYOUT}) -> Tensor"
)
def quant_linear(
    x: Tensor,
    words: Tensor,
    scale: Tensor,
    zero_words: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group_size: int,
    out_features: int,
    in_features: int,
    impl: str,
) -> Tensor:
    """Return y [T, O] of x [T, I]; see `eqat_kernels.quant_linear`."""
    layout = PackedLayout(bits, group_size, out_features, in_features)
    check_packed(words, scale, zero_words, layout)
    check_product(x, bias, words, layout)
    chosen = select("quant_linear", impl, x, layout=layout)
    y: Tensor = implementation("quant_linear", chosen).forward(x, words, scale, zero_words, layout, bias)
    return y


@torch.library.custom_op(
    "eqat::quant_linear_backward",
    mutates_args=(),
    schema=f"(Tensor grad, Tensor x, {_PACKED}, {_LAYOUT}, bool wants_x, bool wants_s) -> (Tensor, Tensor)",
)
def quant_linear_backward(
    grad: Tensor,
    x: Tensor,
    words: Tensor,
    scale: Tensor,
    zero_words: Tensor | None,
    bits: int,
    group_size: int,
    out_features: int,
    in_features: int,
    impl: str,
    wants_x: bool,
    wants_s: bool,
) -> tuple[Tensor, Tensor]:
    """Return dx [T, I] and ds [O, G]; empty what is not wanted, because an op cannot return None."""
    layout = PackedLayout(bits, group_size, out_features, in_features)
    check_packed(words, scale, zero_words, layout)
    check_product(x, None, words, layout)
    check_gradient(grad, x.shape[0], out_features, x.device)
    run = implementation("quant_linear", select("quant_linear", impl, x, layout=layout)).backward
    grad_x, grad_s = run(grad, x, words, scale, zero_words, layout, (wants_x, wants_s))
    return x.new_empty(0) if grad_x is None else grad_x, scale.new_empty(0) if grad_s is None else grad_s


@quant_linear.register_fake
def _(x: Tensor, words: Tensor, scale: Tensor, zero_words: Tensor | None, bias: Tensor | None, *rest: Any) -> Tensor:
    out_features = rest[2]
    return x.new_empty(x.shape[0], out_features)


@quant_linear_backward.register_fake
def _(grad: Tensor, x: Tensor, words: Tensor, scale: Tensor, zero_words: Tensor | None, *rest: Any) -> Any:
    wants_x, wants_s = rest[-2:]
    return x.new_empty(x.shape if wants_x else 0), scale.new_empty(scale.shape if wants_s else 0)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, words, scale, zero_words, bias, *ctx.rest = inputs
    ctx.save_for_backward(x, words, scale, zero_words)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, words, scale, zero_words = ctx.saved_tensors
    wants_x, _, wants_s, _, wants_bias = ctx.needs_input_grad[:5]
    grad_x, grad_s = quant_linear_backward(grad, x, words, scale, zero_words, *ctx.rest, wants_x, wants_s)
    grad_b = bias_gradient(grad, ctx.bias_dtype) if wants_bias else None
    return grad_x if wants_x else None, None, grad_s if wants_s else None, None, grad_b, *([None] * len(ctx.rest))


quant_linear.register_autograd(_backward, setup_context=_keep)
