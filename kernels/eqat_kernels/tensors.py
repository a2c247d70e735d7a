"""What several ops do with their tensors."""

from __future__ import annotations

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
"""What kernels compute in, and what autocast casts; float64 is for references."""


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the tensor in `dtype`; where there is nothing to do, a tenth of the time of `Tensor.to`."""
    return tensor if tensor.dtype is dtype else tensor.to(dtype)


def product_dtype(tensor: Tensor) -> torch.dtype:
    """Return the dtype that a matrix product of this tensor is made in: autocast's, where it is on."""
    kind = tensor.device.type
    on = torch.is_autocast_enabled(kind) and tensor.dtype in FLOATS
    return torch.get_autocast_dtype(kind) if on else tensor.dtype


def bias_gradient(grad_TO: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the sum over tokens, [O] in `dtype`, the same for every linear layer; added up in float32 at least."""
    return grad_TO.sum(0, dtype=torch.promote_types(grad_TO.dtype, torch.float32)).to(dtype)
