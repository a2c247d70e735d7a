"""Dense packing in Triton, and how every other kernel reads packed bits.

A code of 2, 4 or 8 bits lies inside one word; a code of 3 bits may lie across two. All widths share one source:
a row is read in chunks, the most codes that come out of one 32-bit window,

    2 bits: 16 codes    3 bits: 8 codes (24 of the 32 bits)    4 bits: 8 codes    8 bits: 4 codes

so the source loads a word once, not once per code; the compiler lays the codes of a chunk into neighbouring lanes,
which share it through shared memory. Only for 3 bits does a window need a second word.

Shape letters: R rows of the tile, C chunks, K codes.
"""

# Kernels are written in Triton's language, which has no types for mypy.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from eqat_kernels.layout import words_for

ROWS, COLUMNS, WORDS = 16, 128, 8
"""Tiles of `unpack`, 16 x 128 codes, and `pack`, 16 x 8 words: whole cache lines along a row."""


@triton.jit
def window(line, bit, stride, words, mask, BITS: tl.constexpr):
    """Return 32 bits beginning at `bit` of a packed line of `words` words; bits behind a code's word are undefined.

    `line` points at word 0, `stride` is that of a word; what `mask` excludes is zero.
    """
    word = (bit // 32).to(tl.int64)
    low = tl.load(line + word * stride, mask=mask & (word < words), other=0).to(tl.uint32, bitcast=True)
    shift = (bit % 32).to(tl.uint32)
    if BITS == 3:
        word += 1
        high = tl.load(line + word * stride, mask=mask & (word < words), other=0).to(tl.uint32, bitcast=True)
        return (low >> shift) | ((high << 1) << (31 - shift))  # in two steps: a shift by 32 is undefined
    return low >> shift


@triton.jit
def codes_tile(words_ptr, rows, first, row_count, words, stride_row, stride_word, BITS: tl.constexpr, K: tl.constexpr):
    """Return codes [first, first + K) of `rows`, uint32 [R, K]; `first` and K are multiples of 32."""
    PER_CHUNK: tl.constexpr = 8 if BITS == 3 else 32 // BITS
    bit_C = first * BITS + tl.arange(0, K // PER_CHUNK) * (PER_CHUNK * BITS)
    line_R1 = words_ptr + rows[:, None].to(tl.int64) * stride_row
    chunk_RC = window(line_R1, bit_C[None, :], stride_word, words, rows[:, None] < row_count, BITS)
    place = (tl.arange(0, PER_CHUNK) * BITS).to(tl.uint32)
    codes = (chunk_RC[:, :, None] >> place[None, None, :]) & ((1 << BITS) - 1)
    return tl.reshape(codes, (rows.shape[0], K))


@triton.jit
def unpack_kernel(
    words_ptr, codes_ptr, row_count, length, words, stride_row, stride_word,
    BITS: tl.constexpr, R: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """Write the codes of a tile, uint8, into contiguous [row_count, length]."""
    rows = tl.program_id(0) * R + tl.arange(0, R)
    first = tl.program_id(1) * K
    codes = codes_tile(words_ptr, rows, first, row_count, words, stride_row, stride_word, BITS, K)
    columns = first + tl.arange(0, K)
    place = rows[:, None].to(tl.int64) * length + columns[None, :]
    tl.store(codes_ptr + place, codes.to(tl.uint8), mask=(rows[:, None] < row_count) & (columns[None, :] < length))


@triton.jit
def pack_kernel(
    codes_ptr, words_ptr, row_count, length, words, stride_row, stride_code,
    BITS: tl.constexpr, R: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """Write a tile of words into contiguous [row_count, words].

    A word gathers the codes that overlap it: 16, 12, 8 or 4. The first may begin before it, the last end behind it.
    """
    SLOTS: tl.constexpr = 16 if BITS == 3 else 32 // BITS
    rows = tl.program_id(0) * R + tl.arange(0, R)
    word = tl.program_id(1) * W + tl.arange(0, W)
    first_code = word * 32 // BITS
    code = first_code[:, None] + tl.arange(0, SLOTS)[None, :]  # [W, SLOTS]
    place = code * BITS - word[:, None] * 32  # of the code's lowest bit in this word; negative: in the word before
    inside = (rows[:, None, None] < row_count) & ((place < 32) & (code < length))[None, :, :]
    line = codes_ptr + rows[:, None, None].to(tl.int64) * stride_row
    value = tl.load(line + code[None, :, :].to(tl.int64) * stride_code, mask=inside, other=0).to(tl.uint32)
    left = tl.where(place > 0, place, 0).to(tl.uint32)[None, :, :]
    right = tl.where(place < 0, -place, 0).to(tl.uint32)[None, :, :]
    # slots that begin behind the word hold zero, so that shifts of 32 and more have no bits to lose
    packed = tl.sum((value << (left & 31)) >> right, axis=2)  # the bits are disjoint: their sum is their union
    target = words_ptr + rows[:, None].to(tl.int64) * words + word[None, :]
    tl.store(target, packed.to(tl.int32, bitcast=True), mask=(rows[:, None] < row_count) & (word[None, :] < words))


def pack(codes: Tensor, bits: int) -> Tensor:
    """See `eqat_kernels.pack`."""
    length = codes.shape[-1]
    rows = codes.reshape(-1, length)
    words = torch.empty(rows.shape[0], words_for(length, bits), dtype=torch.int32, device=codes.device)
    grid = (triton.cdiv(rows.shape[0], ROWS), triton.cdiv(words.shape[1], WORDS))
    if words.numel():
        pack_kernel[grid](
            rows, words, rows.shape[0], length, words.shape[1], *rows.stride(), BITS=bits, R=ROWS, W=WORDS
        )
    return words.view(*codes.shape[:-1], words.shape[1])


def unpack(words: Tensor, bits: int, length: int) -> Tensor:
    """See `eqat_kernels.unpack`."""
    rows = words.reshape(-1, words.shape[-1])
    codes = torch.empty(rows.shape[0], length, dtype=torch.uint8, device=words.device)
    grid = (triton.cdiv(rows.shape[0], ROWS), triton.cdiv(length, COLUMNS))
    if codes.numel():
        unpack_kernel[grid](
            rows, codes, rows.shape[0], length, words_for(length, bits), *rows.stride(),
            BITS=bits, R=ROWS, K=COLUMNS,
        )  # fmt: skip
    return codes.view(*words.shape[:-1], length)
