"""How close two floating-point results must be: one table, per operation and dtype.

The measure is `max |actual - expected| / max |expected|`: relative to the size of the tensor, so an
element near zero is not held to its own size, and one wrong element cannot hide in an average.
Integers (codes, packed words, zero points) are not here: compare them with `torch.equal`.

Unit roundoff for orientation: float64 1.1e-16, float32 6e-8, float16 4.9e-4, bfloat16 3.9e-3.
"""

from __future__ import annotations

from typing import Literal

import torch

Operation = Literal["elementwise", "matmul", "gradient", "block", "model"]

TOLERANCES: dict[Operation, dict[torch.dtype, float]] = {
    # one rounding per element: fake quantization, dequantization
    "elementwise": {torch.float64: 1e-14, torch.float32: 5e-7, torch.float16: 1e-3, torch.bfloat16: 8e-3},
    # a sum over the input features in another order: quantized linear layers
    "matmul": {torch.float64: 1e-12, torch.float32: 5e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2},
    # sums over rows, groups and batch: gradients of weights, scales and zero points
    "gradient": {torch.float64: 1e-11, torch.float32: 2e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2},
    # one decoder block, by another route
    "block": {torch.float64: 1e-11, torch.float32: 2e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2},
    # logits of a whole tiny model, by another route
    "model": {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 6e-2},
}


def relative_error(actual: torch.Tensor, expected: torch.Tensor, least: float = 0.0) -> float:
    """`max |actual - expected| / max |expected|`, computed in float64; NaN if either holds a NaN.

    `least` is the size that `expected` counts as having at least.
    """
    difference = (actual.detach().double().cpu() - expected.detach().double().cpu()).abs().max()
    size = expected.detach().double().cpu().abs().max().clamp(min=least)
    return float(difference / size) if size > 0 else float(difference)


def assert_close(
    actual: torch.Tensor,
    expected: torch.Tensor,
    operation: Operation,
    dtype: torch.dtype | None = None,
    *,
    least: float = 0.0,
) -> None:
    """Assert equal shapes and a relative error within the table's entry.

    `dtype` is the precision the computation ran in; by default the dtype of `actual`. `expected` may be
    of a higher precision. `least` is for a sum that may cancel: the size of such a sum where it does not.
    """
    assert actual.shape == expected.shape, f"shapes differ: {actual.shape} and {expected.shape}"
    if actual.numel() == 0:
        return
    allowed = TOLERANCES[operation][dtype or actual.dtype]
    error = relative_error(actual, expected, least)
    assert error <= allowed, f"{operation}: relative error {error:.3g} is above {allowed:.3g}"
