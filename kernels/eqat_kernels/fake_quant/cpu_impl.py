"""Fake quantization in C: one pass over W forward, one pass over W and its gradient backward."""

from __future__ import annotations

import torch
from torch import Tensor

from eqat_kernels.cpu_library import call, weight_dtype
from eqat_kernels.tensors import cast


def forward(weight: Tensor, scale: Tensor, zero_point: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """See `eqat_kernels.fake_quant.reference.forward`."""
    w, s, z = weight.contiguous(), _float32(scale), _float32(zero_point)
    result = torch.empty_like(w, dtype=weight_dtype(dtype))
    narrow = result.dtype is torch.bfloat16
    call("fake_quantize_forward", narrow, w, s, z, result, s.numel(), w.shape[1] // s.shape[1], bits)
    return cast(result, dtype)


def backward(
    grad: Tensor, weight: Tensor, scale: Tensor, zero_point: Tensor, bits: int, grad_w: Tensor, *, remake: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """See `eqat_kernels.fake_quant.reference.backward`."""
    w, s, z = weight.contiguous(), _float32(scale), _float32(zero_point)
    d = cast(grad, weight_dtype(grad.dtype)).contiguous()
    w_hat = torch.empty_like(d) if remake else None
    grad_s, grad_z = torch.empty_like(s), torch.empty_like(z)
    narrow, size = d.dtype is torch.bfloat16, w.shape[1] // s.shape[1]
    call("fake_quantize_backward", narrow, d, w, s, z, grad_w, w_hat, grad_s, grad_z, s.numel(), size, bits)
    return grad_s, grad_z, None if w_hat is None else cast(w_hat, grad.dtype)


def _float32(per_group: Tensor) -> Tensor:
    return cast(per_group, torch.float32).contiguous()
