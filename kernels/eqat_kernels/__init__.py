"""The kernel layer that training and serving share; it knows tensors, not models.

Every op has a readable torch `reference`, which is the specification, and one entry point here that
picks an implementation (`dispatch.select`). Importing this package needs torch only.
"""

from eqat_kernels.cached_attention import cached_attention
from eqat_kernels.columns import compensate_columns, descend_columns
from eqat_kernels.dequant import dequantize
from eqat_kernels.dispatch import IMPLEMENTATIONS, select, use
from eqat_kernels.fake_quant import fake_quant_linear, fake_quantize
from eqat_kernels.levels import round_to_levels
from eqat_kernels.narrow_linear import narrow_linear
from eqat_kernels.packing import PackedLayout, pack, unpack
from eqat_kernels.quant_linear import quant_linear

__all__ = [
    "IMPLEMENTATIONS",
    "PackedLayout",
    "cached_attention",
    "compensate_columns",
    "dequantize",
    "descend_columns",
    "fake_quant_linear",
    "fake_quantize",
    "narrow_linear",
    "pack",
    "quant_linear",
    "round_to_levels",
    "select",
    "unpack",
    "use",
]
