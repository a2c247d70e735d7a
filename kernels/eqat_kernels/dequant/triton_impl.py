"""W_hat = (W_int - z) * s (eq. 2 of EfficientQAT) in Triton: a pass over the words, one over the result.

Also the tile that the gradient of the step sizes starts from. A tile of K columns lies inside one group, so it needs
one s and one z per row: K divides the group size, or there is one group per row.

Shape letters: R rows of the tile, K columns.
"""

# Kernels are written in Triton's language, which has no types for mypy.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from eqat_kernels.layout import PackedLayout, columns_of_tile
from eqat_kernels.packing.triton_impl import codes_tile, window

ROWS = 128
"""Rows of the tile of `dequantize`: with 64 columns 64 weights a thread, 9 instructions each; with 32 rows it is 15."""


@triton.jit
def zero_points(zeros_ptr, rows, group, row_count, groups, BITS: tl.constexpr):
    """Return z of a group, or of several, of `rows` as float32; `zeros_ptr` is None on the symmetric grid."""
    if zeros_ptr is None:
        z = tl.full(rows.shape, 1 << (BITS - 1), tl.float32)
    else:  # a return above would not keep Triton before 3.8 from compiling what follows it
        words = tl.cdiv(row_count * BITS, 32)
        bits = window(zeros_ptr + group, rows * BITS, groups, words, rows < row_count, BITS)
        z = (bits & ((1 << BITS) - 1)).to(tl.float32)
    return z


@triton.jit
def centred_tile(
    words_ptr, zeros_ptr, rows, first, group, row_count, groups, words, BITS: tl.constexpr, K: tl.constexpr
):
    """Return W_int - z, exact in float32, [R, K], for columns [first, first + K) inside `group`.

    2^23 + code is a float whose last bits are the code. Writing the code there and subtracting 2^23 + z replaces the
    conversion to float, which a GPU does at a fraction of the speed of an addition, and centres on the way.
    """
    codes = codes_tile(words_ptr, rows, first, row_count, words, words, 1, BITS, K)
    shifted = (codes | 0x4B000000).to(tl.float32, bitcast=True)
    return shifted - (zero_points(zeros_ptr, rows, group, row_count, groups, BITS) + 8388608.0)[:, None]


@triton.jit
def scales(scale_ptr, rows, group, row_count, groups):
    """Return s of a group, or of several, of `rows` as float32; zero behind the last row."""
    place = rows.to(tl.int64) * groups + group
    return tl.load(scale_ptr + place, mask=rows < row_count, other=0.0).to(tl.float32)


@triton.jit
def dequantize_kernel(
    words_ptr, scale_ptr, zeros_ptr, weight_ptr, row_count, columns_count, groups, group_size, words,
    BITS: tl.constexpr, R: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """Write a tile of W_hat into contiguous [row_count, columns_count]."""
    rows = tl.program_id(1) * R + tl.arange(0, R)
    first = tl.program_id(0) * K
    group = first // group_size
    centred = centred_tile(words_ptr, zeros_ptr, rows, first, group, row_count, groups, words, BITS, K)
    weight = centred * scales(scale_ptr, rows, group, row_count, groups)[:, None]
    columns = first + tl.arange(0, K)
    place = rows[:, None].to(tl.int64) * columns_count + columns[None, :]
    inside = (rows[:, None] < row_count) & (columns[None, :] < columns_count)
    tl.store(weight_ptr + place, weight.to(weight_ptr.dtype.element_ty), mask=inside)


def dequantize(
    words: Tensor, scale: Tensor, zero_words: Tensor | None, layout: PackedLayout, dtype: torch.dtype
) -> Tensor:
    """See `eqat_kernels.dequantize`."""
    rows, columns = layout.out_features, layout.in_features
    weight = torch.empty(rows, columns, dtype=dtype, device=words.device)
    tile = columns_of_tile(layout, 64)
    dequantize_kernel[(triton.cdiv(columns, tile), triton.cdiv(rows, ROWS))](
        *packed_arguments(words, scale, zero_words), weight, rows, columns, layout.groups, layout.group_size,
        words.shape[1], BITS=layout.bits, R=ROWS, K=tile,
    )  # fmt: skip
    return weight


def packed_arguments(words: Tensor, scale: Tensor, zero_words: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the packed tensors with contiguous rows; a checkpoint stores them so, and then nothing is copied."""
    return words.contiguous(), scale.contiguous(), None if zero_words is None else zero_words.contiguous()
