"""A few rows of x times a packed matrix in Triton: two products an instruction, straight from the packed words.

A decode step is limited by what it costs to make a number of a code. Here that is one instruction for two codes. Cut
out where it lies in a 16-bit half, at bit p, a code q is a float16 already: the subnormal number q 2^(p - 24). A word
thus holds two float16 at a time, and a product of halves takes both. x is made to fit: 32 columns at a time it is
divided by a power of two 2^e, so that it is below 2, and multiplied by 2^(14 - p), so that every product is q x 2^-10.
x is bfloat16, which this keeps whole. Float16 adds up eight products; then float32 takes over, and z is taken out once
for the 32 columns of a unit:

    y += s (2^10 2^e (sum q x 2^-10) - z sum x)

The pairs of a unit, 32 codes in N words: at 2, 4 and 8 bits those that lie 16 bits apart; at 3 bits codes k and k + 16,
for which the 96 bits of a unit are first laid side by side as twice 48.

Every tensor is one-dimensional, a unit for each thread, and the outputs of a program are tuples of them: there is no
layout to choose, which Triton 3.6 and 3.8 would do differently.

Shape letters: N outputs of a program, U units it takes at a time.
"""

# Kernels are written in Triton's language, which has no types for mypy.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, assignment, misc"

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

from eqat_kernels.dequant.triton_impl import packed_arguments, zero_points
from eqat_kernels.layout import PackedLayout

MOST = 6
"""Rows up to which this is faster than dequantizing once for all rows (docs/kernels.md)."""

UNIT = 32
"""Codes that fill whole words at every bit width."""

OUTPUTS, UNITS = 4, 128
"""Every x that is prepared serves 4 outputs, 128 threads have a unit each. 8 outputs take a fifth fewer instructions
and, with their registers, a fifth more time on an H200."""

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
def add_products(a, b, total):
    """Return total + a * b in the float16 halves of words."""
    if INTERPRETED:
        low = float_of(a) * float_of(b) + float_of(total)
        result = to_halves(low, float_of(a >> 16) * float_of(b >> 16) + float_of(total >> 16))
    else:
        result = tl.inline_asm_elementwise(
            "fma.rn.f16x2 $0, $1, $2, $3;", "=r,r,r,r", [a, b, total], tl.uint32, True, 1
        )  # fmt: skip
    return result


@triton.jit
def value(quads, K: tl.constexpr):
    """Return x at column K of every unit, float32 [U], from tensors of four bfloat16 each."""
    pair = (quads[K // 4] >> (32 * (K % 4 // 2))).to(tl.uint32)
    return ((pair & 0xFFFF0000) if K % 2 else (pair << 16)).to(tl.float32, bitcast=True)


@triton.jit
def paired_words(line_ptr, BITS: tl.constexpr):
    """Return the words of every unit of a row, [U] each, with the two codes of a pair 16 bits apart."""
    found = ()
    for word in tl.static_range(BITS):
        found += (tl.load(line_ptr + word).to(tl.uint32, bitcast=True),)
    if BITS == 3:  # six halves: 0 1 2 beside 3 4 5
        pair_03 = (found[0] & 0xFFFF) | (found[1] & 0xFFFF0000)
        pair_14 = (found[0] >> 16) | (found[2] << 16)
        found = (pair_03, pair_14, (found[1] & 0xFFFF) | (found[2] & 0xFFFF0000))
    return found


@triton.jit
def halves_of_pair(quads, down, PAIR: tl.constexpr, BITS: tl.constexpr):
    """Return the x of one pair of codes of every unit, as the codes where they lie need them."""
    BIT: tl.constexpr = PAIR * BITS % 16
    PLACE: tl.constexpr = 0 if BIT + BITS > 16 else (BIT - 6 if BIT + BITS > 10 else BIT)
    APART: tl.constexpr = 16 if BITS == 3 else 16 // BITS
    FIRST: tl.constexpr = PAIR // APART * 2 * APART + PAIR % APART
    times = down * 2.0 ** (14 - PLACE)
    return to_halves(value(quads, FIRST) * times, value(quads, FIRST + APART) * times)


@triton.jit
def prepared_x(quads_ptr, unit, inside, BITS: tl.constexpr):
    """Return x of every unit as halves, a tensor for each pair of codes, its sum, and what a sum of products lacks."""
    quads = ()
    for place in tl.static_range(8):
        quads += (tl.load(quads_ptr + unit * 8 + place, mask=inside, other=0),)
    x_sum = tl.zeros(unit.shape, tl.float32)
    largest = tl.full(unit.shape, 1e-30, tl.float32)
    for column in tl.static_range(32):
        x = value(quads, column)
        x_sum += x
        largest = tl.maximum(largest, tl.abs(x))
    exponent = largest.to(tl.uint32, bitcast=True) & 0x7F800000
    down = (0x7F000000 - exponent).to(tl.float32, bitcast=True)
    halves = ()
    for pair in tl.static_range(16):
        halves += (halves_of_pair(quads, down, pair, BITS),)
    return halves, x_sum, exponent.to(tl.float32, bitcast=True) * 1024.0


@triton.jit
def codes_of_pair(source, PAIR: tl.constexpr, BITS: tl.constexpr):
    """Return one pair of codes of every unit, cut out where it lies, as subnormal float16."""
    WORD: tl.constexpr = PAIR * BITS // 16
    BIT: tl.constexpr = PAIR * BITS % 16
    ALONE: tl.constexpr = (1 << BITS) - 1
    if BIT + BITS > 16:  # codes 5 and 10 of 3 bits lie across two halves
        LOW: tl.constexpr = 16 - BIT
        low = (source[WORD] >> BIT) & ((ALONE >> (BITS - LOW)) * 0x10001)
        codes = low | ((source[WORD + 1] << LOW) & ((ALONE >> LOW << LOW) * 0x10001))
    else:  # bits 10 to 15 of a half are exponent and sign: codes that reach there are moved down
        DOWN: tl.constexpr = 6 if BIT + BITS > 10 else 0
        codes = (source[WORD] >> DOWN) & ((ALONE << (BIT - DOWN)) * 0x10001)
    return codes


@triton.jit
def store_sums(total, y_ptr, bias_ptr, first_output, outputs, FIRST: tl.constexpr):
    """Sum the tensors of four outputs over the units, together, and store them."""
    even_U2 = tl.join(total[FIRST], total[FIRST + 2])
    four_U22 = tl.join(even_U2, tl.join(total[FIRST + 1], total[FIRST + 3]))
    y = tl.reshape(tl.sum(four_U22, axis=0), (4,))
    output = first_output + FIRST + tl.arange(0, 4)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + output, mask=output < outputs, other=0.0).to(tl.float32)
    tl.store(y_ptr + output, y.to(y_ptr.dtype.element_ty), mask=output < outputs)


@triton.jit
def few_rows_kernel(
    x_ptr, words_ptr, scale_ptr, zeros_ptr, bias_ptr, y_ptr, inputs, outputs, groups, words,
    BITS: tl.constexpr, UNITS_OF_GROUP: tl.constexpr, N: tl.constexpr, U: tl.constexpr,
):  # fmt: skip
    """Write N outputs of one row. What lies behind the last output or unit is that one again, and x is zero there."""
    token = tl.program_id(0)
    first_output = tl.program_id(1) * N
    quads_ptr = (x_ptr + token.to(tl.int64) * inputs).to(tl.pointer_type(tl.uint64))
    units = inputs // 32
    total = (tl.zeros((U,), tl.float32),) * N
    for first in range(0, units, U):
        inside = first + tl.arange(0, U) < units
        unit = tl.minimum(first + tl.arange(0, U), units - 1)
        group = unit // UNITS_OF_GROUP
        halves, x_sum, up = prepared_x(quads_ptr, unit, inside, BITS)
        grown = ()
        for output in tl.static_range(N):
            row = tl.minimum(first_output + output, outputs - 1).to(tl.int64)
            source = paired_words(words_ptr + row * words + unit * BITS, BITS)
            even = tl.zeros((U,), tl.uint32)
            odd = tl.zeros((U,), tl.uint32)
            for pair in tl.static_range(0, 16, 2):
                even = add_products(codes_of_pair(source, pair, BITS), halves[pair], even)
                odd = add_products(codes_of_pair(source, pair + 1, BITS), halves[pair + 1], odd)
            z = zero_points(zeros_ptr, tl.full((U,), row, tl.int64), group, outputs, groups, BITS)
            s = tl.load(scale_ptr + row * groups + group).to(tl.float32)
            products = (float_of(even) + float_of(even >> 16)) + (float_of(odd) + float_of(odd >> 16))
            grown += (total[output] + s * (products * up - z * x_sum),)
        total = grown
    for quarter in tl.static_range(N // 4):
        store_sums(total, y_ptr + token.to(tl.int64) * outputs, bias_ptr, first_output, outputs, 4 * quarter)


def takes(x: Tensor, layout: PackedLayout) -> bool:
    """Say whether `forward` can multiply these rows, and is the faster way."""
    return x.shape[0] <= MOST and x.dtype is torch.bfloat16 and layout.in_features % UNIT == 0


def forward(
    x: Tensor, words: Tensor, scale: Tensor, zero_words: Tensor | None, layout: PackedLayout, bias: Tensor | None
) -> Tensor:
    """See `eqat_kernels.quant_linear.reference.forward`; x in bfloat16."""
    tokens, outputs = x.shape[0], layout.out_features
    y = torch.empty(tokens, outputs, dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    units = min(UNITS, triton.next_power_of_2(layout.in_features // UNIT))
    few_rows_kernel[(tokens, triton.cdiv(outputs, OUTPUTS))](
        _aligned(x), *packed_arguments(words, scale, zero_words), bias, y, layout.in_features, outputs, layout.groups,
        words.shape[1], BITS=layout.bits, UNITS_OF_GROUP=layout.group_size // UNIT, N=OUTPUTS, U=units,
        num_warps=max(1, units // 32),
    )  # fmt: skip
    return y


def _aligned(x: Tensor) -> Tensor:
    """Return x as it can be read four numbers at a time."""
    x = x.contiguous()
    return x if x.data_ptr() % 8 == 0 else x.clone()
