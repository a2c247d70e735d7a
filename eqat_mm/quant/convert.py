"""Conversions between the linears, as functions: nn.Linear -> FakeQuantLinear -> PackedLinear -> nn.Linear.

With quantized activations: nn.Linear -> DynamicFakeLinear -> DynamicPackedLinear.
"""

from __future__ import annotations

import warnings

import torch
from torch import nn

from eqat_mm.quant.bit_widths import UNQUANTIZED
from eqat_mm.quant.dynamic_linear import DynamicFakeLinear, DynamicPackedLinear
from eqat_mm.quant.fake_linear import FakeQuantLinear
from eqat_mm.quant.grid import as_stored, quantize, smallest_step
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
    """Quantize for real: s is rounded as it is stored and z clamped first, then codes are taken (eq. 1)."""
    scale = as_stored(fake.scale, fake.spec).float()
    _warn_where_lost(fake)
    zero_point = fake.zero_point.clamp(0, fake.spec.top)
    codes = quantize(fake.weight, scale, zero_point, fake.spec)
    return PackedLinear.from_codes(codes, scale, zero_point, fake.bias, fake.spec)


def _warn_where_lost(fake: FakeQuantLinear) -> None:
    """Say once that weights are too small for the dtype of the step sizes; a group of zeros loses nothing."""
    smallest = smallest_step(fake.spec.storage_dtype)
    small = fake.scale.abs() < smallest
    if small.any() and fake.weight.unflatten(1, (small.shape[1], -1))[small].any():
        warnings.warn(
            f"step sizes below {smallest:.1e}, the smallest of {fake.spec.scale_dtype}, are raised to it: their "
            "weights are rounded more coarsely, or to zero; --quant.scale_dtype bfloat16 keeps them",
            stacklevel=2,
        )


def to_dynamic_fake(linear: nn.Linear, spec: QuantSpec, activation_bits: int, *, layer: str) -> DynamicFakeLinear:
    """Return the trainable twin of `linear` with a quantized input; it holds the same parameters.

    Raises:
        ConfigError: the group size does not divide the inputs of `layer`.
    """
    return DynamicFakeLinear(linear.weight, linear.bias, spec, activation_bits, layer=layer)


@torch.no_grad()
def to_dynamic_packed(fake: DynamicFakeLinear) -> PackedLinear:
    """Quantize for real; the output stays the same. An input that is not quantized needs no class of its own."""
    codes, scale = fake.codes()
    bias = None if fake.bias is None else fake.bias.detach()
    zero_point = torch.full_like(scale, fake.spec.middle)
    if fake.activation_bits == UNQUANTIZED:
        return PackedLinear.from_codes(codes, scale, zero_point, bias, fake.spec)
    bits = fake.activation_bits
    return DynamicPackedLinear.from_codes(codes, scale, zero_point, bias, fake.spec, activation_bits=bits)
