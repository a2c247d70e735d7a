"""The symmetric min-max quantizer of LLM-QAT (arXiv 2305.17888), for weights, activations, keys and values.

    alpha = max|X| / (2^(N-1) - 1)
    X_q   = alpha * round(X / alpha)

over the last dimension of X, which the caller shapes: the channels of a token, the inputs of an output channel, a
group of them, or the channels of one head of a key. Nothing is clipped: the largest |X| has the code 2^(N-1) - 1. In
the backward the whole quantizer counts as the identity (straight-through), so it costs nothing there.

Where alpha is stored, it is rounded to its 16-bit type before codes are taken. That loses nothing: a relative change
of 2^-8, bfloat16's, moves X / alpha by less than half even where it is 127, so no code leaves its range and every X
stays within half a step of X_q.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from eqat_mm.quant.bit_widths import UNQUANTIZED
from eqat_mm.quant.grid import SMALLEST_STEP, smallest_step


def largest_code(bits: int) -> int:
    """Return 2^(N-1) - 1."""
    return (1 << (bits - 1)) - 1


@torch.no_grad()
def quantize_symmetric(x: Tensor, bits: int, scale_dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """Return the codes round(X / alpha) and alpha.

    Args:
        x: float [..., n]; one alpha for every n numbers.
        bits: N.
        scale_dtype: dtype to which alpha is rounded first; None leaves it as it is.

    Returns:
        codes [..., n], integers from -(2^(N-1) - 1) to 2^(N-1) - 1, and alpha [..., 1] of at least `smallest_step`:
        both float32, or float64 where x is.
    """
    x = x if x.dtype is torch.float64 else x.float()
    scale = torch.linalg.vector_norm(x, ord=torch.inf, dim=-1, keepdim=True) / largest_code(bits)
    scale = scale.clamp_(min=SMALLEST_STEP if scale_dtype is None else smallest_step(scale_dtype))
    if scale_dtype is not None:
        scale = scale.to(scale_dtype).to(x.dtype)
    return (x / scale).round_(), scale


def fake_quantize_symmetric(x: Tensor, bits: int, scale_dtype: torch.dtype | None = None) -> Tensor:
    """Return X_q in the dtype of x, with straight-through gradients; x itself at 16 bits.

    Args:
        x: float [..., n]; one alpha for every n numbers.
        bits: N.
        scale_dtype: as in `quantize_symmetric`.
    """
    if bits == UNQUANTIZED:
        return x
    quantized: Tensor = _FakeQuantize.apply(x, bits, scale_dtype)
    return quantized


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bits: int, scale_dtype: torch.dtype | None) -> Tensor:
        codes, scale = quantize_symmetric(x, bits, scale_dtype)
        return codes.mul_(scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad, None, None
