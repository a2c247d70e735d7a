"""Packed linear layer in plain torch: dequantize, multiply, and forget the dense weight.

    y  = x @ W_hat.T + b,        W_hat = (W_int - z) * s
    dx = dy @ W_hat
    ds = sum over the group of (dy.T @ x) * (W_int - z)

Shape letters: T tokens (all leading dimensions), I inputs, O outputs, G groups, g group size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from eqat_kernels.dequant.reference import centred_codes, dequantize
from eqat_kernels.layout import PackedLayout


def forward(
    x: Tensor, words: Tensor, scale: Tensor, zero_words: Tensor | None, layout: PackedLayout, bias: Tensor | None
) -> Tensor:
    """Return y [T, O] of x [T, I]; see `eqat_kernels.quant_linear`."""
    y = torch.nn.functional.linear(x, dequantize(words, scale, zero_words, layout, x.dtype))
    return y if bias is None else y + bias.to(y.dtype)


def backward(
    grad: Tensor,
    x: Tensor,
    words: Tensor,
    scale: Tensor,
    zero_words: Tensor | None,
    layout: PackedLayout,
    wanted: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    """Return dx [T, I] and ds [O, G] from dy [T, O]; None for what is not `wanted`."""
    c_OGg = centred_codes(words, zero_words, layout, grad.dtype)
    grad_x = grad_s = None
    if wanted[0]:
        grad_x = grad @ (c_OGg * scale.to(grad.dtype).unsqueeze(-1)).flatten(1)
    if wanted[1]:
        grad_w_OGg = (grad.T @ x).unflatten(1, c_OGg.shape[1:])
        grad_s = torch.einsum("ogi,ogi->og", grad_w_OGg, c_OGg).to(scale.dtype)
    return grad_x, grad_s
