"""Fake quantization with straight-through gradients, in plain torch.

With u = W / s, zr = round(z), v = round(u) + zr, q = clamp(v, 0, Q), Q = 2^N - 1 (elementwise, s and z per
group):

    W_hat   = (q - zr) * s
    inside  = (v == q)
    dW      = dW_hat * inside
    ds      = sum over the group of dW_hat * (q - zr - inside * u)
    dz      = sum over the group of dW_hat * (-s) * (1 - inside)

which is the table of EfficientQAT's per-element gradients written without cases. The backward recomputes u
from W, s and z, so nothing of the size of W is kept between the passes.

Shape letters: O output rows, G groups, g group size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def fake_quantize(weight: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """See `eqat_kernels.fake_quantize`."""
    return _FakeQuantize.apply(weight, scale, zero_point, bits)  # type: ignore[no-any-return]


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
        ctx.save_for_backward(weight, scale, zero_point)
        ctx.top = (1 << bits) - 1
        w_OGg, s_OG1, z_OG1 = _grouped(weight, scale, zero_point)
        q_OGg = (w_OGg / s_OG1).round_().add_(z_OG1).clamp_(0, ctx.top)
        return q_OGg.sub_(z_OG1).mul_(s_OG1).view_as(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor, Tensor | None, None]:
        weight, scale, zero_point = ctx.saved_tensors
        w_OGg, s_OG1, z_OG1 = _grouped(weight, scale, zero_point)
        grad_OGg = grad.reshape(w_OGg.shape)
        u_OGg = w_OGg / s_OG1
        v_OGg = u_OGg.round().add_(z_OG1)
        q_OGg = v_OGg.clamp(0, ctx.top)
        inside_OGg = (v_OGg == q_OGg).to(grad.dtype)
        grad_w_OGg = grad_OGg * inside_OGg
        slope_OGg = q_OGg.sub_(z_OG1).sub_(u_OGg.mul_(inside_OGg))
        grad_s_OG = torch.einsum("ogi,ogi->og", grad_OGg, slope_OGg)
        grad_z_OG = None
        if ctx.needs_input_grad[2]:
            grad_z_OG = (grad_w_OGg.sum(-1) - grad_OGg.sum(-1)) * scale
        return grad_w_OGg.view_as(weight), grad_s_OG, grad_z_OG, None


def _grouped(weight: Tensor, scale: Tensor, zero_point: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    groups = scale.shape[1]
    w_OGg = weight.unflatten(1, (groups, weight.shape[1] // groups))
    return w_OGg, scale.unsqueeze(-1), zero_point.round().unsqueeze(-1)
