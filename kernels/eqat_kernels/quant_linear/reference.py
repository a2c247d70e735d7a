"""Packed linear layer in plain torch: dequantize, multiply, and forget the dense weight.

    y  = x @ W_hat.T + b,        W_hat = (W_int - z) * s
    dx = dy @ W_hat
    ds = sum over the group of (dy.T @ x) * (W_int - z)

Shape letters: T tokens (all leading dimensions), I inputs, O outputs, G groups, g group size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from eqat_kernels.dequant.reference import centred_codes, dequantize
from eqat_kernels.packing import PackedLayout


def quant_linear(
    x: Tensor,
    words: Tensor,
    scale: Tensor,
    zero_words: Tensor | None,
    layout: PackedLayout,
    bias: Tensor | None,
) -> Tensor:
    """See `eqat_kernels.quant_linear`."""
    y: Tensor = _QuantLinear.apply(x, words, scale, zero_words, layout)
    return y if bias is None else y + bias.to(y.dtype)


class _QuantLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, words: Tensor, scale: Tensor, zero_words: Tensor | None, layout: PackedLayout
    ) -> Tensor:
        ctx.save_for_backward(x, words, scale, zero_words)
        ctx.layout = layout
        return torch.nn.functional.linear(x, dequantize(words, scale, zero_words, layout, x.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, Tensor | None, None, None]:
        x, words, scale, zero_words = ctx.saved_tensors
        c_OGg = centred_codes(words, zero_words, ctx.layout, grad.dtype)
        grad_x = grad_s_OG = None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ (c_OGg * scale.to(grad.dtype).unsqueeze(-1)).flatten(1)
        if ctx.needs_input_grad[2]:
            grad_w_OI = grad.reshape(-1, grad.shape[-1]).T @ x.reshape(-1, x.shape[-1])
            grad_w_OGg = grad_w_OI.unflatten(1, c_OGg.shape[1:])
            grad_s_OG = torch.einsum("ogi,ogi->og", grad_w_OGg, c_OGg).to(scale.dtype)
        return grad_x, None, grad_s_OG, None, None
