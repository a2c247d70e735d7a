"""Where a grid starts: min-max, the range with the least weighted error, GPTQ on that range, or GPTQ refined.

Shape letters: O output rows, I inputs, G groups, g group size, C candidates.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from eqat_kernels import round_to_levels
from eqat_mm.quant.gptq import gptq
from eqat_mm.quant.grid import away_from_zero
from eqat_mm.quant.refine import refine
from eqat_mm.quant.spec import QuantSpec

Init = Literal["minmax", "search", "gptq", "refined"]

SMALLEST_SHRINK = {2: 0.3, 3: 0.55, 4: 0.75, 8: 0.95}
"""bits -> smallest fraction of the range that the search tries; the fewer codes, the more clipping pays."""

CANDIDATES = 6
"""Fractions tried for the lower and for the upper end of the range, evenly spaced up to 1."""


NUMBERS = {"cpu": 1, "cuda": 1 << 25}
"""How many weights, each counted once for every candidate, are tried at a time, and one candidate at least: a GPU
wants few large operations, 128 MiB for a copy of them, a CPU what stays in its cache."""


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


def _range_grid(
    w_OGg: Tensor, spec: QuantSpec, shrink_low: float | Tensor, shrink_high: float | Tensor
) -> tuple[Tensor, Tensor]:
    """Grid that covers the group's range, each end shrunk towards zero; zero itself is always covered.

    Several ratios, [C, 1, 1], give a grid for each, [C, O, G].
    """
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
    smallest = SMALLEST_SHRINK[spec.bits]
    fractions = [1 - (1 - smallest) * i / (CANDIDATES - 1) for i in range(CANDIDATES)]
    pairs = [(low, high) for low in fractions for high in ((low,) if spec.symmetric else fractions)]
    at_a_time = max(1, NUMBERS[w_OGg.device.type] // w_OGg.numel())
    best: tuple[Tensor, ...] = ()
    for shrink_C2 in torch.tensor(pairs, device=w_OGg.device).split(at_a_time):
        found = _best(w_OGg, h_Gg, shrink_C2, spec)
        best = tuple(map(torch.where, [found[0] < best[0]] * 3, found, best)) if best else found
    _, scale, zero = best
    return scale, zero


def _best(w_OGg: Tensor, h_Gg: Tensor, shrink_C2: Tensor, spec: QuantSpec) -> tuple[Tensor, ...]:
    """Return error, s and z, [O, G] each, of the candidate with the least error in each group, the first of equals."""
    scale_COG, zero_COG = _range_grid(w_OGg, spec, *shrink_C2[:, :, None, None].unbind(1))
    scale_COG = _refit(w_OGg, h_Gg, scale_COG, zero_COG, spec)
    error_COG = _error(w_OGg, h_Gg, scale_COG, zero_COG, spec).nan_to_num(nan=torch.inf)
    best_1OG = error_COG.argmin(0, keepdim=True)
    return tuple(each.gather(0, best_1OG)[0] for each in (error_COG, scale_COG, zero_COG))


def _levels(w_OGg: Tensor, scale: Tensor, zero: Tensor, spec: QuantSpec) -> Tensor:
    return round_to_levels(w_OGg / scale.unsqueeze(-1), zero.unsqueeze(-1), spec.top)


def _refit(w_OGg: Tensor, h_Gg: Tensor, scale: Tensor, zero: Tensor, spec: QuantSpec) -> Tensor:
    """Least-squares s for the codes that `scale` gives: sum(h w c) / sum(h c^2)."""
    c_OGg = _levels(w_OGg, scale, zero, spec)
    hc_OGg = c_OGg * h_Gg
    fitted = (hc_OGg * w_OGg).sum(-1) / (hc_OGg * c_OGg).sum(-1)
    usable = fitted.isfinite() & (fitted.abs() > 0) & (spec.symmetric | (fitted > 0))
    return away_from_zero(torch.where(usable, fitted, scale), signed=spec.symmetric)


def _error(w_OGg: Tensor, h_Gg: Tensor, scale: Tensor, zero: Tensor, spec: QuantSpec) -> Tensor:
    residual = _levels(w_OGg, scale, zero, spec).mul_(scale.unsqueeze(-1)).sub_(w_OGg)
    return residual.square_().mul_(h_Gg).sum(-1)
