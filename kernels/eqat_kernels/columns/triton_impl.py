"""Rounding columns in turn, in Triton: a program holds all columns of some rows in registers.

Shape letters: R rows of a program, B columns, the next power of two.
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

from eqat_kernels.fake_quant.triton_impl import round_to_levels

TILE = 1024
"""Weights of a program: 8 for each of 128 threads."""


@triton.jit
def column(tile_RB, at_B, j):
    """Return column j of a tile, [R]."""
    return tl.sum(tl.where((at_B == j)[None, :], tile_RB, 0.0), axis=1)


@triton.jit
def compensate_kernel(
    w_ptr, factor_ptr, s_ptr, z_ptr, error_ptr, row_count, columns, top, w_row, factor_row, error_row,
    R: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """Write the compensated weight over itself, and the errors."""
    rows, at = tl.program_id(0) * R + tl.arange(0, R), tl.arange(0, B)
    inside = (rows < row_count)[:, None] & (at < columns)[None, :]
    s = tl.load(s_ptr + rows, mask=rows < row_count, other=1.0)
    z = tl.load(z_ptr + rows, mask=rows < row_count, other=0.0)
    w_at = w_ptr + rows[:, None].to(tl.int64) * w_row + at[None, :]
    w = tl.load(w_at, mask=inside, other=0.0)
    errors = tl.zeros((R, B), tl.float32)
    for j in range(columns):
        factor = tl.load(factor_ptr + j * factor_row + at, mask=at < columns, other=0.0)
        w_j = column(w, at, j)
        lost = w_j - round_to_levels(tl.div_rn(w_j, s), z, top.to(tl.float32)) * s
        error = tl.div_rn(lost, tl.load(factor_ptr + j * factor_row + j))
        errors = tl.where((at == j)[None, :], error[:, None], errors)
        w = tl.where((at > j)[None, :], w - error[:, None] * factor[None, :], w)
    tl.store(w_at, w, mask=inside)
    tl.store(error_ptr + rows[:, None].to(tl.int64) * error_row + at[None, :], errors, mask=inside)


@triton.jit
def descend_kernel(
    c_ptr, residual_ptr, h_ptr, s_ptr, z_ptr, wanted_ptr, row_count, columns, top, c_row, residual_row, h_row,
    wanted_row, R: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """Write the new codes over the old ones, and where the minima were."""
    rows, at = tl.program_id(0) * R + tl.arange(0, R), tl.arange(0, B)
    inside = (rows < row_count)[:, None] & (at < columns)[None, :]
    s = tl.load(s_ptr + rows, mask=rows < row_count, other=1.0)
    z = tl.load(z_ptr + rows, mask=rows < row_count, other=0.0)
    line = rows[:, None].to(tl.int64)
    c = tl.load(c_ptr + line * c_row + at[None, :], mask=inside, other=0.0)
    r = tl.load(residual_ptr + line * residual_row + at[None, :], mask=inside, other=0.0)
    wanted = tl.zeros((R, B), tl.float32)
    for j in range(columns):
        h = tl.load(h_ptr + j * h_row + at, mask=at < columns, other=0.0)
        c_j = column(c, at, j)
        wanted_j = c_j + tl.div_rn(column(r, at, j), tl.load(h_ptr + j * h_row + j) * s)
        rounded = round_to_levels(wanted_j, z, top.to(tl.float32))
        r -= ((rounded - c_j) * s)[:, None] * h[None, :]
        c = tl.where((at == j)[None, :], rounded[:, None], c)
        wanted = tl.where((at == j)[None, :], wanted_j[:, None], wanted)
    tl.store(c_ptr + line * c_row + at[None, :], c, mask=inside)
    tl.store(wanted_ptr + line * wanted_row + at[None, :], wanted, mask=inside)


def compensate(weight: Tensor, factor: Tensor, scale: Tensor, zero_point: Tensor, top: int) -> Tensor:
    """See `eqat_kernels.columns.compensate_columns`."""
    errors = torch.empty_like(weight)
    _launch(compensate_kernel, (weight, factor.contiguous()), scale, zero_point, errors, top)
    return errors


def descend(centred: Tensor, residual: Tensor, hessian: Tensor, scale: Tensor, zero_point: Tensor, top: int) -> Tensor:
    """See `eqat_kernels.columns.descend_columns`."""
    wanted = torch.empty_like(centred)
    _launch(descend_kernel, (centred, residual, hessian.contiguous()), scale, zero_point, wanted, top)
    return wanted


def tile_of(columns: int) -> tuple[int, int]:
    """Return (R, B)."""
    width = triton.next_power_of_2(columns)
    return max(1, TILE // width), width


def _launch(
    kernel: Callable[..., Any], tiles: tuple[Tensor, ...], scale: Tensor, zero_point: Tensor, out: Tensor, top: int
) -> None:
    rows, columns = out.shape
    of_program, width = tile_of(columns)
    # columns lie next to each other; whatever has one number per row is made so
    pointers = (*tiles, scale.contiguous(), zero_point.contiguous(), out)
    strides = [tile.stride(0) for tile in (*tiles, out)]
    grid = (triton.cdiv(rows, of_program),)
    kernel[grid](*pointers, rows, columns, top, *strides, R=of_program, B=width)  # type: ignore[index]
