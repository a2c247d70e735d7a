"""Quantization of one linear layer: the spec, the grid, its initialisation, and the two quantized linears."""

from eqat_mm.quant.fake_linear import FakeQuantLinear
from eqat_mm.quant.packed_linear import PackedLinear
from eqat_mm.quant.spec import QuantSpec

__all__ = ["FakeQuantLinear", "PackedLinear", "QuantSpec"]
