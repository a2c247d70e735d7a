"""Conversions between the three linears, as functions: nn.Linear -> FakeQuantLinear -> PackedLinear -> nn.Linear."""

from __future__ import annotations

import torch
from torch import nn

from eqat_mm.quant.fake_linear import FakeQuantLinear
from eqat_mm.quant.grid import away_from_zero, quantize
from eqat_mm.quant.init import Grid
from eqat_mm.quant.packed_linear import PackedLinear
from eqat_mm.quant.spec import QuantSpec


def to_fake(linear: nn.Linear, grid: Grid, spec: QuantSpec) -> FakeQuantLinear:
    """Return the trainable twin of `linear` on the initial `grid`; the weight is copied to float32."""
    weight = grid.weight if grid.weight is not None else linear.weight.detach()
    bias = None if linear.bias is None else linear.bias.detach()
    return FakeQuantLinear(weight.to(torch.float32, copy=True), bias, grid.scale, grid.zero_point, spec)


@torch.no_grad()
def to_packed(fake: FakeQuantLinear) -> PackedLinear:
    """Quantize for real: s is rounded to its storage dtype and z clamped first, then codes are taken (eq. 1)."""
    signed = fake.spec.symmetric
    stored = fake.scale.to(fake.spec.storage_dtype).float()
    scale = away_from_zero(stored, signed=signed)
    zero_point = fake.zero_point.clamp(0, fake.spec.top)
    codes = quantize(fake.weight, scale, zero_point, fake.spec)
    return PackedLinear.from_codes(codes, scale, zero_point, fake.bias, fake.spec)


@torch.no_grad()
def to_dense(packed: PackedLinear, dtype: torch.dtype = torch.float32) -> nn.Linear:
    """Return the dense linear with the same output."""
    layout = packed.layout
    dense = nn.Linear(layout.in_features, layout.out_features, bias=packed.bias is not None, device="meta")
    dense.weight = nn.Parameter(packed.dequantize(dtype), requires_grad=False)
    if packed.bias is not None:
        dense.bias = nn.Parameter(packed.bias.to(dtype), requires_grad=False)
    return dense
