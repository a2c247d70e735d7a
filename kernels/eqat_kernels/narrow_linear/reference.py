"""The product with a 16-bit weight in torch: the weight is copied to float32."""

from __future__ import annotations

from torch import Tensor


def forward(x: Tensor, weight: Tensor) -> Tensor:
    """Return x @ weight.T, float32 [T, O], from x, float32 [T, I], and a 16-bit weight [O, I]."""
    return x @ weight.to(x.dtype).T


def backward(grad: Tensor, weight: Tensor) -> Tensor:
    """Return dx = dy @ weight, float32 [T, I]."""
    return grad @ weight.to(grad.dtype)
