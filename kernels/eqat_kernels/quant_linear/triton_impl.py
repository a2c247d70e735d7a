"""Packed linear layer on a GPU.

A few rows, a decode step: one kernel straight from the packed words (`few_rows`). More rows: the weight is dequantized
into a buffer, and the product is the library's own. A kernel that unpacks while it multiplies was eight times slower on
an H200 and is gone (docs/kernels.md): it unpacks a weight again for every tile of rows.

ds is the library's weight gradient, multiplied with the centred codes and summed over each group.

Shape letters: T tokens, I inputs, O outputs, G groups; R rows, K columns of a tile.
"""

# Kernels are written in Triton's language, which has no types for mypy.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from eqat_kernels.dequant.triton_impl import centred_tile, dequantize, packed_arguments
from eqat_kernels.layout import PackedLayout, columns_of_tile
from eqat_kernels.quant_linear import few_rows
from eqat_kernels.tensors import cast

ROWS, COLUMNS = 32, 64
"""Largest tile of the sums over groups: 2048 weights for 128 threads."""


@triton.jit
def scale_gradient_kernel(
    grad_w_ptr, words_ptr, zeros_ptr, grad_s_ptr, outputs, inputs, groups, group_size, words,
    BITS: tl.constexpr, R: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """Write ds of R rows and one group: the sum of dW (W_int - z) over the group."""
    group = tl.program_id(0)
    rows = tl.program_id(1) * R + tl.arange(0, R)
    line = grad_w_ptr + rows[:, None].to(tl.int64) * inputs
    total = tl.zeros((R, K), tl.float32)
    end = (group + 1) * group_size
    for first in range(group * group_size, end, K):
        columns = first + tl.arange(0, K)
        inside = (rows[:, None] < outputs) & (columns[None, :] < end)
        grad_w = tl.load(line + columns[None, :], mask=inside, other=0.0).to(tl.float32)
        total += grad_w * centred_tile(words_ptr, zeros_ptr, rows, first, group, outputs, groups, words, BITS, K)
    place = grad_s_ptr + rows.to(tl.int64) * groups + group
    tl.store(place, tl.sum(total, axis=1).to(grad_s_ptr.dtype.element_ty), mask=rows < outputs)


def forward(
    x: Tensor, words: Tensor, scale: Tensor, zero_words: Tensor | None, layout: PackedLayout, bias: Tensor | None
) -> Tensor:
    """See `eqat_kernels.quant_linear.reference.forward`."""
    if few_rows.takes(x, layout):
        return few_rows.forward(x, words, scale, zero_words, layout, bias)
    weight = dequantize(words, scale, zero_words, layout, x.dtype)
    return torch.nn.functional.linear(x.contiguous(), weight, None if bias is None else cast(bias, x.dtype))


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
    grad = grad.contiguous()
    grad_x = grad @ dequantize(words, scale, zero_words, layout, grad.dtype) if wanted[0] else None
    grad_s = _scale_gradient(grad.T @ x.contiguous(), words, scale, zero_words, layout) if wanted[1] else None
    return grad_x, grad_s


def _scale_gradient(
    grad_w: Tensor, words: Tensor, scale: Tensor, zero_words: Tensor | None, layout: PackedLayout
) -> Tensor:
    words, scale, zeros = packed_arguments(words, scale, zero_words)
    grad_s = torch.empty(layout.out_features, layout.groups, dtype=scale.dtype, device=grad_w.device)
    scale_gradient_kernel[(layout.groups, triton.cdiv(layout.out_features, ROWS))](
        grad_w, words, zeros, grad_s, layout.out_features, layout.in_features, layout.groups, layout.group_size,
        words.shape[1], BITS=layout.bits, R=ROWS, K=columns_of_tile(layout, COLUMNS),
    )  # fmt: skip
    return grad_s
