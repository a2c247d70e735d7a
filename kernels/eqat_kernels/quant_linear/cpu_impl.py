"""Packed linear layer on a CPU.

Few rows, a decode step: C, straight from the packed words; each run of codes is unpacked once for all rows.
Many rows: torch's matrix product, on slices of the weight dequantized by C into a buffer that stays in the cache.

Shape letters: T tokens, I inputs, O outputs, G groups.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from eqat_kernels.cpu_library import call, packed
from eqat_kernels.dequant.cpu_impl import contiguous, dequantize_rows
from eqat_kernels.layout import PackedLayout
from eqat_kernels.tensors import cast

FEW = 16
"""Rows up to which unpacking once beats a dense product; the C source holds sums for as many."""

_HELD = tuple(next(rows for rows in (1, 4, 8, FEW) if tokens <= rows) for tokens in range(FEW + 1))
"""Rows that the C source has code for, by the number of them that there are."""

RUN = 32
"""Columns that are unpacked together."""

SLICE = 1 << 20
"""Weights dequantized at a time: they stay in the cache until the product has read them."""

SUMMED = 1 << 23
"""The same, for a product that is a sum over slices: few sums, and little beside the dense weight of a large layer."""


def forward(
    x: Tensor, words: Tensor, scale: Tensor, zero_words: Tensor | None, layout: PackedLayout, bias: Tensor | None
) -> Tensor:
    """See `eqat_kernels.quant_linear.reference.forward`."""
    run = _forward_few if x.shape[0] <= FEW else _forward_many
    y = run(x, words, scale, zero_words, layout)
    return y if bias is None else y.add_(bias.to(y.dtype))


def _forward_few(x: Tensor, words: Tensor, scale: Tensor, zero_words: Tensor | None, layout: PackedLayout) -> Tensor:
    words, scale, zeros = words.contiguous(), cast(scale, torch.float32).contiguous(), contiguous(zero_words)
    tokens, columns = x.shape
    rows = _HELD[tokens]
    x_few = cast(x, torch.float32).contiguous()
    if rows > tokens or columns % RUN:
        x_few = torch.nn.functional.pad(x_few, (0, -columns % RUN, 0, rows - tokens))
    if rows > 1:
        x_few = x_few.unflatten(1, (-1, RUN)).transpose(0, 1).contiguous()  # read from front to back
    y = torch.empty(rows, layout.out_features, dtype=torch.float32)
    call("multiply", layout.bits, packed(words, zeros, layout, range(layout.out_features)), scale, x_few, y, rows)
    return cast(y if rows == tokens else y[:tokens], x.dtype)


def _forward_many(x: Tensor, words: Tensor, scale: Tensor, zero_words: Tensor | None, layout: PackedLayout) -> Tensor:
    x = x.contiguous()  # torch's bfloat16 product may read beyond the rows of a view, and a NaN there shows
    parts = [x @ dequantize_rows(words, scale, zero_words, layout, x.dtype, rows).T for rows in _slices(layout, SLICE)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def backward(
    grad: Tensor,
    x: Tensor,
    words: Tensor,
    scale: Tensor,
    zero_words: Tensor | None,
    layout: PackedLayout,
    wanted: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    """See `eqat_kernels.quant_linear.reference.backward`; never holds a whole dense weight of a large layer."""
    grad, x = grad.contiguous(), x.contiguous()  # as in the forward
    grad_x = grad_s = None
    if wanted[0]:
        grad_x = _input_gradient(grad, words, scale, zero_words, layout)
    if wanted[1]:
        grad_s = _scale_gradient(grad, x, words, zero_words, layout).to(scale.dtype)
    return grad_x, grad_s


def _input_gradient(
    grad: Tensor, words: Tensor, scale: Tensor, zero_words: Tensor | None, layout: PackedLayout
) -> Tensor:
    total: Tensor | None = None
    for rows in _slices(layout, SUMMED):
        weight = dequantize_rows(words, scale, zero_words, layout, grad.dtype, rows)
        part = grad[:, rows.start : rows.stop].contiguous() @ weight
        total = part if total is None else total.float().add_(part)
    assert total is not None
    return total.to(grad.dtype)


def _scale_gradient(grad: Tensor, x: Tensor, words: Tensor, zero_words: Tensor | None, layout: PackedLayout) -> Tensor:
    words, zeros = words.contiguous(), contiguous(zero_words)
    grad_s = torch.empty(layout.out_features, layout.groups, dtype=torch.float32)
    for rows in _slices(layout, SLICE):
        grad_w = (grad[:, rows.start : rows.stop].T @ x).float()
        call("scale_gradient", layout.bits, packed(words, zeros, layout, rows), grad_w, grad_s)
    return grad_s


def _slices(layout: PackedLayout, weights: int) -> Iterator[range]:
    rows = max(1, weights // layout.in_features)
    for start in range(0, layout.out_features, rows):
        yield range(start, min(start + rows, layout.out_features))
