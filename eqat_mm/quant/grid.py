"""The grid equations (EfficientQAT, eqs. 1 and 2), without gradients.

Shape letters: O output rows, I inputs, G groups, g group size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from eqat_kernels import round_to_levels
from eqat_mm.quant.spec import QuantSpec

SMALLEST_STEP = 1e-8
"""Step sizes are kept at least this far from zero, so that W / s stays finite."""


def quantize(weight: Tensor, scale: Tensor, zero_point: Tensor, spec: QuantSpec) -> Tensor:
    """Return the codes clamp(round(W / s) + round(z), 0, 2^N - 1) (eq. 1).

    Args:
        weight: float [O, I].
        scale: float [O, G].
        zero_point: float [O, G].
        spec: gives N.

    Returns:
        uint8 [O, I].
    """
    w_OGg = weight.unflatten(1, (scale.shape[1], -1))
    z_OG1 = zero_point.round().unsqueeze(-1)
    codes: Tensor = round_to_levels(w_OGg / scale.unsqueeze(-1), z_OG1, spec.top).add_(z_OG1)
    return codes.to(torch.uint8).flatten(1)


def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """Return (W_int - round(z)) * s (eq. 2), float [O, I], from codes uint8 [O, I]."""
    c_OGg = codes.to(scale.dtype).unflatten(1, (scale.shape[1], -1)) - zero_point.round().unsqueeze(-1)
    weight: Tensor = (c_OGg * scale.unsqueeze(-1)).flatten(1)
    return weight


def away_from_zero(
    scale: Tensor, *, signed: bool, smallest: float = SMALLEST_STEP, out: Tensor | None = None
) -> Tensor:
    """Return `scale` with every entry at least `smallest` from zero; positive unless `signed`.

    Written to `out` where it is given, which may be `scale`.
    """
    if not signed:
        return torch.clamp(scale, min=smallest, out=out)
    sign = torch.where(scale < 0, -1.0, 1.0).to(scale.dtype)
    return torch.mul(sign, scale.abs().clamp(min=smallest), out=out)


def smallest_step(dtype: torch.dtype) -> float:
    """Return the smallest step size that is stored in `dtype`: a normal number, since others lose their digits."""
    return max(SMALLEST_STEP, torch.finfo(dtype).smallest_normal)


def as_stored(scale: Tensor, spec: QuantSpec) -> Tensor:
    """Return step sizes in the dtype in which they are stored, `spec.storage_dtype`.

    This is the one place where they are rounded. Too small ones are raised first: rounding could make them zero. What
    is not finite, or becomes so in float16, stays so, for whoever knows the layer's name to refuse.
    """
    dtype = spec.storage_dtype
    return away_from_zero(scale, signed=spec.symmetric, smallest=smallest_step(dtype)).to(dtype)
