"""Fake quantization in C: one pass over W forward, one pass over W and its gradient backward."""

from __future__ import annotations

import torch
from torch import Tensor

from eqat_kernels.cpu_library import call, weight_dtype


def forward(weight: Tensor, scale: Tensor, zero_point: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """See `eqat_kernels.fake_quant.reference.forward`."""
    w, s, z = weight.contiguous(), scale.contiguous(), zero_point.contiguous()
    result = torch.empty(w.shape, dtype=weight_dtype(dtype))
    narrow = result.dtype is torch.bfloat16
    call("fake_quantize_forward", narrow, w, s, z, result, s.numel(), w.shape[1] // s.shape[1], bits)
    return result.to(dtype)


def backward(
    grad: Tensor, weight: Tensor, scale: Tensor, zero_point: Tensor, bits: int
) -> tuple[Tensor, Tensor, Tensor]:
    """See `eqat_kernels.fake_quant.reference.backward`."""
    d, w, s, z = (tensor.contiguous() for tensor in (grad.to(weight_dtype(grad.dtype)), weight, scale, zero_point))
    grad_w, grad_s, grad_z = (torch.empty(tensor.shape, dtype=tensor.dtype) for tensor in (w, s, z))
    narrow, size = d.dtype is torch.bfloat16, w.shape[1] // s.shape[1]
    call("fake_quantize_backward", narrow, d, w, s, z, grad_w, grad_s, grad_z, s.numel(), size, bits)
    return grad_w, grad_s, grad_z
