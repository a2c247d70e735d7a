"""Fake quantization in C: one pass over W forward, one pass over W and its gradient backward."""

from __future__ import annotations

import torch
from torch import Tensor

from eqat_kernels.cpu_library import call


def forward(weight: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """See `eqat_kernels.fake_quant.reference.forward`."""
    w, s, z = weight.contiguous(), scale.contiguous(), zero_point.contiguous()
    result = torch.empty(w.shape, dtype=w.dtype)
    call("fake_quantize_forward", w, s, z, result, s.numel(), w.shape[1] // s.shape[1], bits)
    return result


def backward(
    grad: Tensor, weight: Tensor, scale: Tensor, zero_point: Tensor, bits: int
) -> tuple[Tensor, Tensor, Tensor]:
    """See `eqat_kernels.fake_quant.reference.backward`."""
    d, w, s, z = (tensor.contiguous() for tensor in (grad, weight, scale, zero_point))
    grad_w, grad_s, grad_z = (torch.empty(tensor.shape, dtype=tensor.dtype) for tensor in (w, s, z))
    call("fake_quantize_backward", d, w, s, z, grad_w, grad_s, grad_z, s.numel(), w.shape[1] // s.shape[1], bits)
    return grad_w, grad_s, grad_z
