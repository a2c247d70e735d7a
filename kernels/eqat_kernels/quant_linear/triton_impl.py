"""Packed linear layer in Triton: the dense weight exists only as tiles in registers.

    forward            y[T, O]   a tile of y walks along I; few rows: several programs share the walk
    input gradient     dx[T, I]  a tile of dx walks along O
    scale gradient     ds[O, G]  a tile of the weight gradient walks along T, is multiplied with the centred codes
                                 and summed along its rows: it never leaves the registers

All three start from `centred_tile`; a tile's columns of I lie inside one group.

Shape letters: T tokens, I inputs, O outputs; M, N, K tokens, outputs and inputs of a tile.
"""

# Kernels are written in Triton's language, which has no types for mypy.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

from eqat_kernels.dequant.triton_impl import centred_tile, packed_arguments, scales
from eqat_kernels.layout import PackedLayout
from eqat_kernels.quant_linear.tiles import forward_tile, input_gradient_tile, scale_gradient_tile, splits

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def multiply(a, b, total, PRECISION: tl.constexpr):
    """Return total + a @ b in float32."""
    if INTERPRETED:  # numpy has no bfloat16; the operands are rounded to it all the same
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total)
    return tl.dot(a, b, total, input_precision=PRECISION)


@triton.jit
def load_tile(tensor_ptr, rows, columns, row_count, column_count, stride_row, stride_column):
    """Load a tile of a matrix of any strides; zero outside."""
    place = rows[:, None].to(tl.int64) * stride_row + columns[None, :].to(tl.int64) * stride_column
    inside = (rows[:, None] < row_count) & (columns[None, :] < column_count)
    return tl.load(tensor_ptr + place, mask=inside, other=0.0)


@triton.jit
def store_tile(tensor_ptr, value, rows, columns, row_count, column_count):
    """Store a tile of a contiguous matrix."""
    place = rows[:, None].to(tl.int64) * column_count + columns[None, :]
    inside = (rows[:, None] < row_count) & (columns[None, :] < column_count)
    tl.store(tensor_ptr + place, value.to(tensor_ptr.dtype.element_ty), mask=inside)


@triton.jit
def forward_kernel(
    x_ptr, words_ptr, scale_ptr, zeros_ptr, bias_ptr, y_ptr, tokens, inputs, outputs, groups, group_size, words,
    x_row, x_column, steps,
    BITS: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write a tile of y, or of one of the partial sums of y, [splits, T, O], when the walk along I is shared.

    The walk of program `split` is `steps` tiles long.
    """
    row = tl.program_id(1) * M + tl.arange(0, M)
    output = tl.program_id(0) * N + tl.arange(0, N)
    split = tl.program_id(2)
    total = tl.zeros((M, N), tl.float32)
    for first in range(split * steps * K, min((split + 1) * steps * K, inputs), K):
        group = first // group_size
        x = load_tile(x_ptr, row, first + tl.arange(0, K), tokens, inputs, x_row, x_column)
        centred = centred_tile(words_ptr, zeros_ptr, output, first, group, outputs, groups, words, BITS, K)
        s = scales(scale_ptr, output, group, outputs, groups)
        if M < K:  # fewer products to scale than weights; and centred codes are exact in any 16-bit float
            total += multiply(x, tl.trans(centred.to(x.dtype)), tl.zeros((M, N), tl.float32), PRECISION) * s[None, :]
        else:
            total = multiply(x, tl.trans((centred * s[:, None]).to(x.dtype)), total, PRECISION)
    if bias_ptr is not None:
        total += tl.load(bias_ptr + output, mask=output < outputs, other=0.0).to(tl.float32)[None, :]
    part = y_ptr + split.to(tl.int64) * tokens * outputs
    store_tile(part, total, row, output, tokens, outputs)


@triton.jit
def combine_kernel(parts_ptr, bias_ptr, y_ptr, size, outputs, splits, BLOCK: tl.constexpr):
    """Write y = sum of its partial sums + bias, always in the same order."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = place < size
    total = tl.zeros((BLOCK,), tl.float32)
    part = parts_ptr + place
    for _ in range(splits):
        total += tl.load(part, mask=inside, other=0.0)
        part += size
    if bias_ptr is not None:
        total += tl.load(bias_ptr + place % outputs, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + place, total.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def input_gradient_kernel(
    grad_ptr, words_ptr, scale_ptr, zeros_ptr, grad_x_ptr, tokens, inputs, outputs, groups, group_size, words,
    grad_row, grad_column,
    BITS: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write a tile [M, K] of dx = dy @ W_hat."""
    row = tl.program_id(1) * M + tl.arange(0, M)
    first = tl.program_id(0) * K
    group = first // group_size
    total = tl.zeros((M, K), tl.float32)
    for start in range(0, outputs, N):
        output = start + tl.arange(0, N)
        grad = load_tile(grad_ptr, row, output, tokens, outputs, grad_row, grad_column)
        centred = centred_tile(words_ptr, zeros_ptr, output, first, group, outputs, groups, words, BITS, K)
        s = scales(scale_ptr, output, group, outputs, groups)
        total = multiply(grad, (centred * s[:, None]).to(grad.dtype), total, PRECISION)
    store_tile(grad_x_ptr, total, row, first + tl.arange(0, K), tokens, inputs)


@triton.jit
def scale_gradient_kernel(
    grad_ptr, x_ptr, words_ptr, zeros_ptr, parts_ptr, tokens, inputs, outputs, groups, group_size, words, tiles,
    grad_row, grad_column, x_row, x_column,
    BITS: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write one column of the [O, tiles] sums whose sum over the tiles of a group is ds."""
    tile = tl.program_id(0)
    output = tl.program_id(1) * N + tl.arange(0, N)
    first = tile * K
    total = tl.zeros((N, K), tl.float32)
    for start in range(0, tokens, M):
        row = start + tl.arange(0, M)
        grad = load_tile(grad_ptr, row, output, tokens, outputs, grad_row, grad_column)
        x = load_tile(x_ptr, row, first + tl.arange(0, K), tokens, inputs, x_row, x_column)
        total = multiply(tl.trans(grad), x, total, PRECISION)
    centred = centred_tile(words_ptr, zeros_ptr, output, first, first // group_size, outputs, groups, words, BITS, K)
    part = tl.sum(total * centred, axis=1)  # behind the last column x, and so `total`, is zero
    tl.store(parts_ptr + output.to(tl.int64) * tiles + tile, part, mask=output < outputs)


def forward(
    x: Tensor, words: Tensor, scale: Tensor, zero_words: Tensor | None, layout: PackedLayout, bias: Tensor | None
) -> Tensor:
    """See `eqat_kernels.quant_linear.reference.forward`."""
    tokens, inputs, outputs = x.shape[0], layout.in_features, layout.out_features
    y = torch.empty(tokens, outputs, dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    tile = forward_tile(tokens, layout, x.dtype)
    shares, steps = splits(tokens, layout, tile, x.device)
    parts = y if shares == 1 else torch.empty(shares, tokens, outputs, dtype=torch.float32, device=x.device)
    grid = (triton.cdiv(outputs, tile.N), triton.cdiv(tokens, tile.M), shares)
    forward_kernel[grid](
        x, *packed_arguments(words, scale, zero_words), bias if shares == 1 else None, parts, tokens, inputs, outputs,
        layout.groups, layout.group_size, words.shape[1], *x.stride(), steps,
        BITS=layout.bits, PRECISION=_precision(), **tile.arguments(),
    )  # fmt: skip
    if shares > 1:
        combine_kernel[(triton.cdiv(y.numel(), 1024),)](parts, bias, y, y.numel(), outputs, shares, BLOCK=1024)
    return y


def backward(
    grad: Tensor,
    x: Tensor,
    words: Tensor,
    scale: Tensor,
    zero_words: Tensor | None,
    layout: PackedLayout,
    wanted: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    """See `eqat_kernels.quant_linear.reference.backward`."""
    packed = packed_arguments(words, scale, zero_words)
    grad_x = _input_gradient(grad, packed, layout) if wanted[0] else None
    grad_s = _scale_gradient(grad, x, packed, layout) if wanted[1] else None
    return grad_x, grad_s


def _input_gradient(grad: Tensor, packed: tuple[Tensor, Tensor, Tensor | None], layout: PackedLayout) -> Tensor:
    tokens, inputs, outputs = grad.shape[0], layout.in_features, layout.out_features
    grad_x = torch.empty(tokens, inputs, dtype=grad.dtype, device=grad.device)
    if grad_x.numel() == 0:
        return grad_x
    tile = input_gradient_tile(layout, grad.dtype)
    input_gradient_kernel[(triton.cdiv(inputs, tile.K), triton.cdiv(tokens, tile.M))](
        grad, *packed, grad_x, tokens, inputs, outputs, layout.groups, layout.group_size, packed[0].shape[1],
        *grad.stride(), BITS=layout.bits, PRECISION=_precision(), **tile.arguments(),
    )  # fmt: skip
    return grad_x


def _scale_gradient(
    grad: Tensor, x: Tensor, packed: tuple[Tensor, Tensor, Tensor | None], layout: PackedLayout
) -> Tensor:
    words, scale, zeros = packed
    tile = scale_gradient_tile(layout, grad.dtype)
    tiles = triton.cdiv(layout.in_features, tile.K)
    parts = torch.empty(layout.out_features, tiles, dtype=torch.float32, device=grad.device)
    scale_gradient_kernel[(tiles, triton.cdiv(layout.out_features, tile.N))](
        grad, x, words, zeros, parts, grad.shape[0], layout.in_features, layout.out_features, layout.groups,
        layout.group_size, words.shape[1], tiles, *grad.stride(), *x.stride(),
        BITS=layout.bits, PRECISION=_precision(), **tile.arguments(),
    )  # fmt: skip
    per_group = parts if tiles == layout.groups else parts.unflatten(1, (layout.groups, -1)).sum(-1)
    return per_group.to(scale.dtype)


def _precision() -> str:
    """Return how float32 products are computed: as torch is told to compute its own."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
