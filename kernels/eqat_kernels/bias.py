"""The gradient of a bias, the same for every linear layer."""

from __future__ import annotations

import torch
from torch import Tensor


def bias_gradient(grad_TO: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the sum over tokens, [O] in `dtype`; added up in float32 at least."""
    return grad_TO.sum(0, dtype=torch.promote_types(grad_TO.dtype, torch.float32)).to(dtype)
