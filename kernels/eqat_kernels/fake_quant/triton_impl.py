"""Fake quantization in Triton: one pass over W forward, one pass over W and its gradient backward.

A program owns R whole groups and walks along them K columns at a time, so ds and dz of a group are summed in
registers, in a fixed order, and stored once. Arithmetic is float32 whatever W is; the formulas are in the reference.

Shape letters: O rows of W, G groups of a row, R groups of a program, K columns of a step.
"""

# Kernels are written in Triton's language, which has no types for mypy.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 2048
"""Weights a program holds at a time: 16 for each of 128 threads."""


@triton.jit
def round_half_even(x):
    """Round to the nearest integer, ties to even: two additions in place of an instruction of a quarter of the speed.

    1.5 * 2^23 pushes the fraction out of a float32. From 2^22 on the result may be off by one; such a value is far
    outside of every range of codes, and clipped all the same.
    """
    return (x + 12582912.0) - 12582912.0


@triton.jit
def round_to_levels(steps, z, top):
    """Round W / s to the levels of its grid, codes less zero point, as `eqat_kernels.levels` does."""
    return tl.clamp(round_half_even(steps) + z, 0.0, top) - z


@triton.jit
def per_group(tensor_ptr, row, group, stride_row, stride_group, inside, default):
    """Load one value per group, float32 [R]."""
    return tl.load(tensor_ptr + row * stride_row + group * stride_group, mask=inside, other=default).to(tl.float32)


@triton.jit
def forward_kernel(
    w_ptr, s_ptr, z_ptr, out_ptr, group_count, groups, size,
    w_row, w_column, s_row, s_group, z_row, z_group, out_row, out_column,
    BITS: tl.constexpr, R: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """Write W_hat of R groups."""
    TOP: tl.constexpr = (1 << BITS) - 1
    index = tl.program_id(0) * R + tl.arange(0, R)
    inside_R = index < group_count
    row, group = (index // groups).to(tl.int64), (index % groups).to(tl.int64)
    s = per_group(s_ptr, row, group, s_row, s_group, inside_R, 1.0)[:, None]
    z = round_half_even(per_group(z_ptr, row, group, z_row, z_group, inside_R, 0.0))[:, None]
    for start in range(0, size, K):
        column = start + tl.arange(0, K)
        inside = inside_R[:, None] & (column < size)[None, :]
        at = (group * size)[:, None] + column[None, :]
        w = tl.load(w_ptr + row[:, None] * w_row + at * w_column, mask=inside, other=0.0).to(tl.float32)
        # correctly rounded division: the codes trained with are the codes that are stored in the end
        level = round_to_levels(tl.div_rn(w, s), z, TOP)
        out = out_ptr + row[:, None] * out_row + at * out_column
        tl.store(out, (level * s).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def backward_kernel(
    grad_ptr, w_ptr, s_ptr, z_ptr, grad_w_ptr, grad_s_ptr, grad_z_ptr, out_ptr, group_count, groups, size,
    grad_row, grad_column, w_row, w_column, s_row, s_group, z_row, z_group, grad_w_row, grad_w_column,
    BITS: tl.constexpr, R: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """Write dW of R groups, their ds and dz into contiguous [O, G], and W_hat into contiguous [O, I] unless None.

    dW may be written over the gradient: both are read and written by the same thread at the same strides.
    """
    TOP: tl.constexpr = (1 << BITS) - 1
    index = tl.program_id(0) * R + tl.arange(0, R)
    inside_R = index < group_count
    row, group = (index // groups).to(tl.int64), (index % groups).to(tl.int64)
    s_R = per_group(s_ptr, row, group, s_row, s_group, inside_R, 1.0)
    z = round_half_even(per_group(z_ptr, row, group, z_row, z_group, inside_R, 0.0))[:, None]
    sum_s = tl.zeros((R,), tl.float32)
    sum_clipped = tl.zeros((R,), tl.float32)
    for start in range(0, size, K):
        column = start + tl.arange(0, K)
        inside = inside_R[:, None] & (column < size)[None, :]
        at = (group * size)[:, None] + column[None, :]
        w = tl.load(w_ptr + row[:, None] * w_row + at * w_column, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + row[:, None] * grad_row + at * grad_column, mask=inside, other=0.0).to(tl.float32)
        u = tl.div_rn(w, s_R[:, None])
        level = round_to_levels(u, z, TOP)
        inside_grid = level == round_half_even(u)
        grad_w = tl.where(inside_grid, grad, 0.0)
        sum_s += tl.sum(grad * (level - tl.where(inside_grid, u, 0.0)), axis=1)
        sum_clipped += tl.sum(grad - grad_w, axis=1)
        to = grad_w_ptr + row[:, None] * grad_w_row + at * grad_w_column
        tl.store(to, grad_w.to(grad_w_ptr.dtype.element_ty), mask=inside)
        if out_ptr is not None:
            out = out_ptr + row[:, None] * (groups * size) + at
            tl.store(out, (level * s_R[:, None]).to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(grad_s_ptr + index, sum_s.to(grad_s_ptr.dtype.element_ty), mask=inside_R)
    tl.store(grad_z_ptr + index, (-s_R * sum_clipped).to(grad_z_ptr.dtype.element_ty), mask=inside_R)


def forward(weight: Tensor, scale: Tensor, zero_point: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """See `eqat_kernels.fake_quant.reference.forward`."""
    result = torch.empty_like(weight, dtype=dtype)
    _launch(
        forward_kernel, (weight, scale, zero_point, result), (weight, scale, zero_point, result), scale, weight, bits
    )
    return result


def backward(
    grad: Tensor, weight: Tensor, scale: Tensor, zero_point: Tensor, bits: int, grad_w: Tensor, *, remake: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """See `eqat_kernels.fake_quant.reference.backward`."""
    grad_s, grad_z = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (scale, zero_point))
    result = torch.empty(grad.shape, dtype=grad.dtype, device=grad.device) if remake else None
    strided = (grad, weight, scale, zero_point, grad_w)
    _launch(backward_kernel, (*strided, grad_s, grad_z, result), strided, scale, weight, bits)
    return grad_s, grad_z, result


def tile_of(group_size: int) -> tuple[int, int]:
    """Return (R, K): all of a group where it fits into the tile, and as many groups as fill it."""
    columns = min(triton.next_power_of_2(group_size), TILE)
    return TILE // columns, columns


def _launch(
    kernel: Callable[..., Any],
    pointers: tuple[Tensor | None, ...],
    strided: tuple[Tensor, ...],
    scale: Tensor,
    weight: Tensor,
    bits: int,
) -> None:
    groups = scale.shape[1]
    size = weight.shape[1] // groups
    rows, columns = tile_of(size)
    strides = [stride for tensor in strided for stride in tensor.stride()]
    grid = (triton.cdiv(scale.numel(), rows),)
    kernel[grid](*pointers, scale.numel(), groups, size, *strides, BITS=bits, R=rows, K=columns)  # type: ignore[index]
