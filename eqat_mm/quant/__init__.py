"""Quantization of one linear layer, and of what flows into it and out of it.

The spec, the grid, its initialisation and the quantized linears; activations, keys and values; SmoothQuant.
"""

from eqat_mm.quant.fake_linear import FakeQuantLinear
from eqat_mm.quant.packed_linear import PackedLinear
from eqat_mm.quant.spec import QuantSpec

__all__ = ["FakeQuantLinear", "PackedLinear", "QuantSpec"]
