"""Dense bit packing of codes into 32-bit words."""

from __future__ import annotations

from torch import Tensor

from eqat_kernels.dispatch import implementation, select
from eqat_kernels.layout import PackedLayout
from eqat_kernels.sizes import check_codes, check_words


def pack(codes: Tensor, bits: int, *, impl: str = "auto") -> Tensor:
    """Pack unsigned codes along the last dimension.

    Args:
        codes: integers in [0, 2^bits), any integer dtype, shape [..., n].
        bits: 2, 3, 4 or 8.
        impl: implementation, see `eqat_kernels.dispatch`.

    Returns:
        int32 [..., ceil(n * bits / 32)].

    Raises:
        ValueError: not integers, no such width, or `impl` cannot run.
    """
    check_codes(codes, bits)
    packed: Tensor = implementation("pack", select("pack", impl, codes)).pack(codes, bits)
    return packed


def unpack(words: Tensor, bits: int, length: int, *, impl: str = "auto") -> Tensor:
    """Inverse of `pack`.

    Args:
        words: int32 [..., ceil(length * bits / 32)].
        bits: 2, 3, 4 or 8.
        length: n, codes per row.
        impl: implementation, see `eqat_kernels.dispatch`.

    Returns:
        uint8 [..., n].

    Raises:
        ValueError: not int32, another number of words, no such width, or `impl` cannot run.
    """
    check_words(words, bits, length)
    codes: Tensor = implementation("unpack", select("unpack", impl, words)).unpack(words, bits, length)
    return codes


__all__ = ["PackedLayout", "pack", "unpack"]
