"""Refining a rounded layer: step sizes by least squares, then codes one column at a time, in turn.

GPTQ visits every column once and never comes back. This goes on from its codes and lowers the same error,

    E(s, C) = tr((W - C s) H (W - C s)^T),   C = codes - z,

first over s with C fixed, a system of G unknowns for each row, then over C with s fixed: column j of C is rounded to
where E has its minimum with all other columns as they are. Neither step can raise E, but for the damping.
Coordinate descent of codes is that of QuantEase (arXiv 2309.01885).

Shape letters: O output rows, I inputs, G groups, g group size, B columns of one group.
"""

from __future__ import annotations

import torch
from torch import Tensor

from eqat_kernels import descend_columns, round_to_levels
from eqat_mm.quant.gptq import damp, slices

DAMPING = 0.03
"""Added to the diagonal of the Hessian, as a fraction of its mean."""

ROUNDS = 4
"""Step sizes and codes, this many times."""

SYSTEMS = 1 << 26
"""Numbers in the systems of equations that are solved at a time: 256 MiB. All rows of a 70B model's layer are 20 GB."""

LARGEST_CHANGE = 2.0
"""A step size refitted to outside s / 2 .. 2 s is left as it was: its group hardly matters, or not by itself."""


@torch.no_grad()
def refine(
    weight: Tensor, start: Tensor, scale: Tensor, zero: Tensor, hessian: Tensor, top: int
) -> tuple[Tensor, Tensor]:
    """Return a weight and step sizes whose plain rounding has a smaller error than that of `start`.

    Args:
        weight: W, which is to be approximated, float32 [O, I].
        start: weight whose plain rounding on the grid gives the first codes, float32 [O, I].
        scale: s, float32 [O, G].
        zero: z, float32 [O, G], integers.
        hessian: H, sum of x x^T over calibration tokens, float32 [I, I].
        top: largest code, 2^N - 1.

    Returns:
        (W' float32 [O, I], s float32 [O, G]). W' is where each column had its minimum when it was last visited, so
        that training starts inside the right cell of the grid.
    """
    group = weight.shape[1] // scale.shape[1]
    h_II = damp(hessian, DAMPING)
    wh_OI = weight @ h_II
    z_OI = zero.repeat_interleave(group, 1)
    c_OI = round_to_levels(start / scale.repeat_interleave(group, 1), z_OI, top)
    wanted_OI = torch.empty_like(start)
    for _ in range(ROUNDS):
        scale = _refit(c_OI, wh_OI, h_II, scale)
        _descend(c_OI, wanted_OI, wh_OI, h_II, scale, zero, top)
    return wanted_OI.mul_(scale.repeat_interleave(group, 1)), scale


def _refit(c_OI: Tensor, wh_OI: Tensor, h_II: Tensor, s_OG: Tensor) -> Tensor:
    """Return the least-squares step sizes of these codes; rows are solved apart, so some at a time."""
    rows = max(1, SYSTEMS // s_OG.shape[1] ** 2)
    parts = zip(c_OI.split(rows), wh_OI.split(rows), s_OG.split(rows), strict=True)
    return torch.cat([_refit_rows(c_RI, wh_RI, h_II, s_RG) for c_RI, wh_RI, s_RG in parts])


def _refit_rows(c_OI: Tensor, wh_OI: Tensor, h_II: Tensor, s_OG: Tensor) -> Tensor:
    groups = (s_OG.shape[1], -1)
    c_OGg, h_GgGg = c_OI.unflatten(1, groups), h_II.unflatten(0, groups).unflatten(2, groups)
    normal_OGG = torch.stack(
        [((c_OGg[:, k] @ h_GgGg[k].flatten(1)).view_as(c_OGg) * c_OGg).sum(-1) for k in range(groups[0])], 1
    )
    right_OG = (c_OGg * wh_OI.unflatten(1, groups)).sum(-1)
    fitted_OG = torch.linalg.solve_ex(normal_OGG, right_OG)[0]
    ratio_OG = fitted_OG / s_OG
    usable_OG = (ratio_OG > 1 / LARGEST_CHANGE) & (ratio_OG < LARGEST_CHANGE)
    return torch.where(usable_OG, fitted_OG, s_OG)


def _descend(
    c_OI: Tensor, wanted_OI: Tensor, wh_OI: Tensor, h_II: Tensor, s_OG: Tensor, z_OG: Tensor, top: int
) -> None:
    """Round each column of `c_OI` in place to its minimum; leave the minimum itself, in steps, in `wanted_OI`.

    The residual (W - C s) H is kept for some columns while they are visited, and brought up to date for all by one
    matrix product behind them.
    """
    group = c_OI.shape[1] // s_OG.shape[1]
    residual_OI = wh_OI - (c_OI * s_OG.repeat_interleave(group, 1)) @ h_II
    for k, start in enumerate(range(0, c_OI.shape[1], group)):
        s_O, z_O = s_OG[:, k], z_OG[:, k]
        for columns in slices(start, start + group):
            c_OB, before_OB = c_OI[:, columns], c_OI[:, columns].clone()
            residual_OB, h_BB = residual_OI[:, columns], h_II[columns, columns]
            wanted_OI[:, columns] = descend_columns(c_OB, residual_OB, h_BB, s_O, z_O, top)
            residual_OI -= ((c_OB - before_OB) * s_O.unsqueeze(1)) @ h_II[columns]
