"""Small weights, grids and calibration statistics that the tests of this folder share.

Shape letters: O output rows, I inputs, G groups, g group size, T tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from eqat_mm.quant import FakeQuantLinear, QuantSpec

SPECS = [
    QuantSpec(bits=2, group_size=32),
    QuantSpec(bits=3, group_size=64),
    QuantSpec(bits=4, group_size=-1),
    QuantSpec(bits=8, group_size=32, scale_dtype="float16"),
    QuantSpec(bits=2, group_size=32, symmetric=True),
    QuantSpec(bits=3, group_size=-1, symmetric=True, scale_dtype="float16"),
]


def random_fake_linear(
    spec: QuantSpec, out_features: int = 9, in_features: int = 192, *, bias: bool = True
) -> FakeQuantLinear:
    """Make a layer whose W, s and z look trained: some weights are clipped, z is not an integer."""
    groups = in_features // spec.group_of(in_features, "layer")
    scale = (torch.rand(out_features, groups) + 0.5) * 2 / (1 << spec.bits)
    zero = torch.rand(out_features, groups) * spec.top
    if spec.symmetric:
        scale *= torch.randn(out_features, groups).sign()
        zero = torch.full_like(zero, spec.middle)
    weight = torch.randn(out_features, in_features)
    return FakeQuantLinear(weight, torch.randn(out_features) if bias else None, scale, zero, spec)


def correlated_inputs(tokens: int, in_features: int) -> Tensor:
    """Draw x [T, I] whose channels have unequal sizes and share a few directions, as activations do."""
    shared = torch.randn(tokens, 6) @ torch.randn(6, in_features)
    return (shared + 0.3 * torch.randn(tokens, in_features)) * (torch.rand(in_features) + 0.2)


def squared_error(w_hat_OI: Tensor, w_OI: Tensor, x_TI: Tensor) -> float:
    """||X (W_hat - W)^T||^2, in float64."""
    return float((x_TI.double() @ (w_hat_OI.double() - w_OI.double()).T).square().sum())
