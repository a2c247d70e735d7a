"""`fake_quantize` as torch.compile sees it: two ops registered with torch (see `eqat_kernels.quant_linear.traced`)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from eqat_kernels.dispatch import implementation, select
from eqat_kernels.sizes import check_gradient, check_grid


@torch.library.custom_op("eqat::fake_quantize", mutates_args=())
def fake_quantize(
    weight: Tensor, scale: Tensor, zero_point: Tensor, bits: int, dtype: torch.dtype, impl: str
) -> Tensor:
    """Return W_hat [O, I] in `dtype`; see `eqat_kernels.fake_quantize`."""
    check_grid(weight, scale, zero_point, bits)
    run = implementation("fake_quantize", select("fake_quantize", impl, weight)).forward
    result: Tensor = run(weight, scale, zero_point, bits, dtype)
    return result


@torch.library.custom_op("eqat::fake_quantize_backward", mutates_args=())
def fake_quantize_backward(
    grad: Tensor, weight: Tensor, scale: Tensor, zero_point: Tensor, bits: int, impl: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dW [O, I], ds and dz [O, G]."""
    check_grid(weight, scale, zero_point, bits)
    check_gradient(grad, weight.shape[0], weight.shape[1], weight.device)
    run = implementation("fake_quantize", select("fake_quantize", impl, weight)).backward
    grad_w = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    grad_s, grad_z, _ = run(grad, weight, scale, zero_point, bits, grad_w, remake=False)
    return grad_w, grad_s, grad_z


@fake_quantize.register_fake
def _(weight: Tensor, scale: Tensor, zero_point: Tensor, bits: int, dtype: torch.dtype, impl: str) -> Tensor:
    return weight.new_empty(weight.shape, dtype=dtype)


@fake_quantize_backward.register_fake
def _(grad: Tensor, weight: Tensor, scale: Tensor, zero_point: Tensor, bits: int, impl: str) -> Any:
    return weight.new_empty(weight.shape), scale.new_empty(scale.shape), zero_point.new_empty(zero_point.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    weight, scale, zero_point, ctx.bits, _, ctx.impl = inputs
    ctx.save_for_backward(weight, scale, zero_point)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return *fake_quantize_backward(grad, *ctx.saved_tensors, ctx.bits, ctx.impl), None, None, None


fake_quantize.register_autograd(_backward, setup_context=_keep)
