"""The rounding of a weight to its grid, in torch: once for the references and for whatever looks for a grid."""

from __future__ import annotations

from torch import Tensor


def round_to_levels(steps: Tensor, zero_point: Tensor, top: int) -> Tensor:
    """Round W / s to the levels of its grid, codes less zero point: clamp(round(W / s) + z, 0, Q) - z (eq. 1).

    Args:
        steps: W / s, float; overwritten.
        zero_point: z, whole numbers, of a shape that broadcasts to that of `steps`.
        top: Q, the largest code.
    """
    return steps.round_().add_(zero_point).clamp_(0, top).sub_(zero_point)
