"""A few rows of x times a packed matrix in Triton: two products an instruction, straight from the packed words.

A decode step is limited by what it costs to make a number of a code. Here that is one instruction for two codes. Cut
out where it lies in a 16-bit half, at bit p, a code q is a float16 already: the subnormal number q 2^(p - 24). A word
thus holds two float16 at a time, and a product of halves takes both. x is made to fit: 32 columns at a time it is
divided by a power of two 2^e, so that it is below 2, and multiplied by 2^(14 - p), so that every product is q x 2^-10.
Float32 takes over after 32 columns, where a unit ends, and z is taken out once per unit:

    y += s (2^10 2^e (sum q x 2^-10) - z sum x)

The pairs of a unit, 32 codes in N words: at 2, 4 and 8 bits those that lie 16 bits apart; at 3 bits codes k and k + 16,
for which the 96 bits of a unit are first laid side by side as twice 48.

Shape letters: N outputs, U units of a tile.
"""

# Kernels are written in Triton's language, which has no types for mypy.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

from eqat_kernels.dequant.triton_impl import packed_arguments, scales, zero_points
from eqat_kernels.layout import PackedLayout

MOST = 4
"""Rows up to which this is faster than dequantizing once for all rows (docs/kernels.md)."""

UNIT = 32
"""Codes that fill whole words at every bit width."""

OUTPUTS, UNITS = 8, 128
"""Tile: every x that is loaded serves 8 outputs, with more of them registers run short; 128 threads have a unit each."""

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def float_of(bits):
    """Return the float16 in the low half of a word as float32."""
    return (bits & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def to_halves(low, high):
    """Return two float32 as float16 in the halves of a word."""
    if INTERPRETED:
        low_bits = low.to(tl.float16).to(tl.uint16, bitcast=True).to(tl.uint32)
        word = low_bits | (high.to(tl.float16).to(tl.uint16, bitcast=True).to(tl.uint32) << 16)
    else:
        word = tl.inline_asm_elementwise("cvt.rn.f16x2.f32 $0, $2, $1;", "=r,f,f", [low, high], tl.uint32, True, 1)
    return word


@triton.jit
def add_products(a_NU, b_NU, total_NU):
    """Return total + a * b in the float16 halves of words."""
    if INTERPRETED:
        low = float_of(a_NU) * float_of(b_NU) + float_of(total_NU)
        total = to_halves(low, float_of(a_NU >> 16) * float_of(b_NU >> 16) + float_of(total_NU >> 16))
    else:
        arguments = [a_NU, b_NU, total_NU]
        total = tl.inline_asm_elementwise(
            "fma.rn.f16x2 $0, $1, $2, $3;", "=r,r,r,r", arguments, tl.uint32, True, 1
        )  # fmt: skip
    return total


@triton.jit
def value(quads, K: tl.constexpr, BFLOAT16: tl.constexpr):
    """Return x at column K of every unit, float32 [U], from tensors of four 16-bit floats each."""
    pair = (quads[K // 4] >> (32 * (K % 4 // 2))).to(tl.uint32)
    if BFLOAT16:  # the upper half of a float32
        x = ((pair & 0xFFFF0000) if K % 2 else (pair << 16)).to(tl.float32, bitcast=True)
    else:
        x = float_of(pair >> (16 * (K % 2)))
    return x


@triton.jit
def paired_words(words_ptr, row, unit, words, BITS: tl.constexpr):
    """Return the words of every unit, [N, U] each, with the two codes of a pair 16 bits apart."""
    at = words_ptr + row[:, None].to(tl.int64) * words + (unit * BITS)[None, :]
    found = ()
    for word in tl.static_range(BITS):
        found = found + (tl.load(at + word).to(tl.uint32, bitcast=True),)
    if BITS == 3:  # six halves: 0 1 2 beside 3 4 5
        pair_03 = (found[0] & 0xFFFF) | (found[1] & 0xFFFF0000)
        pair_14 = (found[0] >> 16) | (found[2] << 16)
        found = (pair_03, pair_14, (found[1] & 0xFFFF) | (found[2] & 0xFFFF0000))
    return found


@triton.jit
def add_pair(source, quads, down, total, PAIR: tl.constexpr, BITS: tl.constexpr, BFLOAT16: tl.constexpr):
    """Add the products of one pair of codes of every unit."""
    WORD: tl.constexpr = PAIR * BITS // 16
    BIT: tl.constexpr = PAIR * BITS % 16
    ALONE: tl.constexpr = (1 << BITS) - 1
    if BIT + BITS > 16:  # codes 5 and 10 of 3 bits lie across two halves
        LOW: tl.constexpr = 16 - BIT
        low = (source[WORD] >> BIT) & ((ALONE >> (BITS - LOW)) * 0x10001)
        code = low | ((source[WORD + 1] << LOW) & ((ALONE >> LOW << LOW) * 0x10001))
        times = down * 2.0**14
    else:  # bits 10 to 15 of a half are exponent and sign: codes that reach there are moved down
        DOWN: tl.constexpr = 6 if BIT + BITS > 10 else 0
        code = (source[WORD] >> DOWN) & ((ALONE << (BIT - DOWN)) * 0x10001)
        times = down * 2.0 ** (14 - BIT + DOWN)
    APART: tl.constexpr = 16 if BITS == 3 else 16 // BITS
    FIRST: tl.constexpr = PAIR // APART * 2 * APART + PAIR % APART
    x = to_halves(value(quads, FIRST, BFLOAT16) * times, value(quads, FIRST + APART, BFLOAT16) * times)
    return add_products(code, tl.broadcast_to(x[None, :], total.shape), total)


@triton.jit
def few_rows_kernel(
    x_ptr, words_ptr, scale_ptr, zeros_ptr, bias_ptr, y_ptr, inputs, outputs, groups, words,
    BITS: tl.constexpr, UNITS_OF_GROUP: tl.constexpr, N: tl.constexpr, U: tl.constexpr, BFLOAT16: tl.constexpr,
):  # fmt: skip
    """Write N outputs of one row. What lies behind the last output or unit is that one again, and x is zero there."""
    token = tl.program_id(0)
    output = tl.program_id(1) * N + tl.arange(0, N)
    row = tl.minimum(output, outputs - 1)
    quads_ptr = (x_ptr + token.to(tl.int64) * inputs).to(tl.pointer_type(tl.uint64))
    units = inputs // 32
    total = tl.zeros((N, U), tl.float32)
    for first in range(0, units, U):
        inside = first + tl.arange(0, U) < units
        unit = tl.minimum(first + tl.arange(0, U), units - 1)
        group = (unit // UNITS_OF_GROUP)[None, :]
        source = paired_words(words_ptr, row, unit, words, BITS)
        quads = ()
        for place in tl.static_range(8):
            quads = quads + (tl.load(quads_ptr + unit * 8 + place, mask=inside, other=0),)
        x_sum = tl.zeros((U,), tl.float32)
        largest = tl.full((U,), 1e-30, tl.float32)
        for column in tl.static_range(32):
            x = value(quads, column, BFLOAT16)
            x_sum += x
            largest = tl.maximum(largest, tl.abs(x))
        exponent = largest.to(tl.uint32, bitcast=True) & 0x7F800000
        down = (0x7F000000 - exponent).to(tl.float32, bitcast=True)
        products = tl.zeros((N, U), tl.uint32)
        for pair in tl.static_range(16):
            products = add_pair(source, quads, down, products, pair, BITS, BFLOAT16)
        products_sum = (float_of(products) + float_of(products >> 16)) * (exponent.to(tl.float32, bitcast=True) * 1024.0)
        z = zero_points(zeros_ptr, row[:, None], group, outputs, groups, BITS)
        total += scales(scale_ptr, row[:, None], group, outputs, groups) * (products_sum - z * x_sum[None, :])
    y = tl.sum(total, axis=1)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + row).to(tl.float32)
    place = y_ptr + token.to(tl.int64) * outputs + output
    tl.store(place, y.to(y_ptr.dtype.element_ty), mask=output < outputs)


def takes(x: Tensor, layout: PackedLayout) -> bool:
    """Say whether `forward` can multiply these rows, and is the faster way."""
    return x.shape[0] <= MOST and x.dtype is not torch.float32 and layout.in_features % UNIT == 0


def forward(
    x: Tensor, words: Tensor, scale: Tensor, zero_words: Tensor | None, layout: PackedLayout, bias: Tensor | None
) -> Tensor:
    """See `eqat_kernels.quant_linear.reference.forward`; x in a 16-bit float."""
    tokens, outputs = x.shape[0], layout.out_features
    y = torch.empty(tokens, outputs, dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    units = min(UNITS, triton.next_power_of_2(layout.in_features // UNIT))
    few_rows_kernel[(tokens, triton.cdiv(outputs, OUTPUTS))](
        _aligned(x), *packed_arguments(words, scale, zero_words), bias, y, layout.in_features, outputs, layout.groups,
        words.shape[1], BITS=layout.bits, UNITS_OF_GROUP=layout.group_size // UNIT, N=OUTPUTS, U=units,
        BFLOAT16=x.dtype is torch.bfloat16, num_warps=max(1, units // 32),
    )  # fmt: skip
    return y


def _aligned(x: Tensor) -> Tensor:
    """Return x as it can be read four numbers at a time."""
    x = x.contiguous()
    return x if x.data_ptr() % 8 == 0 else x.clone()
