"""The product with a 16-bit weight on a CPU.

A few rows, a decode step: C, which widens 16 numbers in a register at a time. Many rows: torch's product, on slices of
the weight that are copied to float32.

Shape letters: T tokens, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from eqat_kernels.cpu_library import call

FEW = 16
"""Rows up to which C is used; it holds sums for as many."""

SLICE = 1 << 20
"""Weights copied at a time."""


def forward(x: Tensor, weight: Tensor) -> Tensor:
    """See `eqat_kernels.narrow_linear.reference.forward`."""
    x, weight = x.contiguous(), weight.contiguous()
    if x.shape[0] > FEW:
        return torch.cat([x @ part.to(x.dtype).T for part in _slices(weight)], dim=1)
    rows = next(rows for rows in (1, 4, 8, FEW) if x.shape[0] <= rows)  # what the C source has code for
    given = x if rows == x.shape[0] else torch.nn.functional.pad(x, (0, 0, 0, rows - x.shape[0]))
    y = torch.empty(rows, weight.shape[0])
    call("multiply_narrow", int(weight.dtype is torch.bfloat16), weight, given, y, *weight.shape, rows)
    return y[: x.shape[0]]


def backward(grad: Tensor, weight: Tensor) -> Tensor:
    """See `eqat_kernels.narrow_linear.reference.backward`."""
    total = grad.new_zeros(grad.shape[0], weight.shape[1])
    start = 0
    for part in _slices(weight):
        total.addmm_(grad[:, start : start + len(part)], part.to(grad.dtype))
        start += len(part)
    return total


def _slices(weight: Tensor) -> Iterator[Tensor]:
    yield from weight.split(max(1, SLICE // weight.shape[1]))
