"""Where a grid starts: min-max, the range with the least weighted error, GPTQ on that range, or GPTQ refined.

Shape letters: O output rows, I inputs, G groups, g group size.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from eqat_mm.quant.gptq import gptq
from eqat_mm.quant.grid import away_from_zero
from eqat_mm.quant.refine import refine
from eqat_mm.quant.spec import QuantSpec

Init = Literal["minmax", "search", "gptq", "refined"]

SMALLEST_SHRINK = {2: 0.3, 3: 0.55, 4: 0.75, 8: 0.95}
"""bits -> smallest fraction of the range that the search tries; the fewer codes, the more clipping pays."""

CANDIDATES = 6
"""Fractions tried for the lower and for the upper end of the range, evenly spaced up to 1."""


class Grid(NamedTuple):
    """A quantization grid.

    Attributes:
        scale: s, float32 [O, G].
        zero_point: z, float32 [O, G], integers in [0, 2^N - 1].
        weight: a weight to start from instead of the layer's own, float32 [O, I], or None.
    """

    scale: Tensor
    zero_point: Tensor
    weight: Tensor | None = None


def initial_grid(weight: Tensor, spec: QuantSpec, *, layer: str, init: Init, hessian: Tensor | None = None) -> Grid:
    """Return the grid that a layer starts on.

    Args:
        weight: W, float [O, I].
        spec: bits, group size, symmetry.
        layer: name for messages.
        init: `minmax` (the paper); `search`, which minimises sum_j h_j * (W_hat - W)_j^2 per group with h the
            diagonal of the Hessian; `gptq`, which adds GPTQ's error compensation to the weight on that grid;
            `refined`, which goes on from there (see `eqat_mm.quant.refine`).
        hessian: sum of x x^T over calibration tokens, float [I, I]; not used by `minmax`.

    Raises:
        ConfigError: the group size does not divide I.
    """
    group = spec.group_of(weight.shape[1], layer)
    w_OGg = weight.detach().float().unflatten(1, (-1, group))
    if init == "minmax":
        return Grid(*_range_grid(w_OGg, spec, 1.0, 1.0))
    assert hessian is not None, f"{layer}: init={init} needs calibration statistics"

    def search(w_OGg: Tensor, h_Gg: Tensor) -> tuple[Tensor, Tensor]:
        return _search(w_OGg, h_Gg, spec)

    if init == "search":
        return Grid(*search(w_OGg, hessian.diagonal().unflatten(0, (-1, group))))
    compensated, scale, zero_point = gptq(weight, hessian, group, spec.top, search)
    if init == "refined":
        compensated, scale = refine(weight.detach().float(), compensated, scale, zero_point, hessian, spec.top)
        scale = away_from_zero(scale, signed=spec.symmetric)
    return Grid(scale, zero_point, compensated)


def _range_grid(w_OGg: Tensor, spec: QuantSpec, shrink_low: float, shrink_high: float) -> tuple[Tensor, Tensor]:
    """Grid that covers the group's range, each end shrunk towards zero; zero itself is always covered."""
    if spec.symmetric:
        largest = w_OGg.gather(-1, w_OGg.abs().argmax(-1, keepdim=True)).squeeze(-1)
        scale = away_from_zero(-largest * shrink_low / spec.middle, signed=True)
        return scale, torch.full_like(scale, spec.middle)
    low = w_OGg.amin(-1).clamp(max=0) * shrink_low
    high = w_OGg.amax(-1).clamp(min=0) * shrink_high
    scale = away_from_zero((high - low) / spec.top, signed=False)
    return scale, (-low / scale).round().clamp(0, spec.top)


def _search(w_OGg: Tensor, h_Gg: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Try every pair of shrink ratios (one ratio if symmetric), refit s, keep the best per group.

    The full range comes first: a group that no input reaches keeps it.
    """
    best_error = torch.full(w_OGg.shape[:2], torch.inf, device=w_OGg.device)
    best_scale = torch.ones_like(best_error)
    best_zero = torch.zeros_like(best_error)
    smallest = SMALLEST_SHRINK[spec.bits]
    fractions = [1 - (1 - smallest) * i / (CANDIDATES - 1) for i in range(CANDIDATES)]
    for low in fractions:
        for high in (low,) if spec.symmetric else fractions:
            scale, zero = _range_grid(w_OGg, spec, low, high)
            scale = _refit(w_OGg, h_Gg, scale, zero, spec)
            error = _error(w_OGg, h_Gg, scale, zero, spec)
            better = error < best_error
            best_error = torch.where(better, error, best_error)
            best_scale = torch.where(better, scale, best_scale)
            best_zero = torch.where(better, zero, best_zero)
    return best_scale, best_zero


def _centred(w_OGg: Tensor, scale: Tensor, zero: Tensor, spec: QuantSpec) -> Tensor:
    z_OG1 = zero.unsqueeze(-1)
    return (w_OGg / scale.unsqueeze(-1)).round_().add_(z_OG1).clamp_(0, spec.top).sub_(z_OG1)


def _refit(w_OGg: Tensor, h_Gg: Tensor, scale: Tensor, zero: Tensor, spec: QuantSpec) -> Tensor:
    """Least-squares s for the codes that `scale` gives: sum(h w c) / sum(h c^2)."""
    c_OGg = _centred(w_OGg, scale, zero, spec)
    hc_OGg = c_OGg * h_Gg
    fitted = (hc_OGg * w_OGg).sum(-1) / (hc_OGg * c_OGg).sum(-1)
    usable = fitted.isfinite() & (fitted.abs() > 0) & (spec.symmetric | (fitted > 0))
    return away_from_zero(torch.where(usable, fitted, scale), signed=spec.symmetric)


def _error(w_OGg: Tensor, h_Gg: Tensor, scale: Tensor, zero: Tensor, spec: QuantSpec) -> Tensor:
    residual = _centred(w_OGg, scale, zero, spec).mul_(scale.unsqueeze(-1)).sub_(w_OGg)
    return residual.square_().mul_(h_Gg).sum(-1)
