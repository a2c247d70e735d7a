"""Dense bit packing of codes into 32-bit words."""

from eqat_kernels.packing.reference import PackedLayout, pack, unpack

__all__ = ["PackedLayout", "pack", "unpack"]
