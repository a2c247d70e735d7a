"""GPTQ as a warm start: rounding that pushes each column's error onto the columns still to come.

Source: Frantar et al., GPTQ (arXiv 2210.17323). Columns are visited in their stored order and each group's grid is
made when its first column is reached, from the weight as compensated so far.

Shape letters: O output rows, I inputs, G groups, g group size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from eqat_kernels.columns import LARGEST, compensate_columns

DAMPING = 0.05
"""Added to the diagonal of the Hessian, as a fraction of its mean."""

GroupGrid = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(weights [O, 1, g], importance [1, g]) -> (s [O, 1], z [O, 1])"""


@torch.no_grad()
def gptq(weight: Tensor, hessian: Tensor, group: int, top: int, group_grid: GroupGrid) -> tuple[Tensor, Tensor, Tensor]:
    """Return a grid and a weight whose plain rounding on it gives the GPTQ codes.

    Column j of the returned weight is column j of W plus the compensation it had received when its turn came.

    Args:
        weight: W, float [O, I].
        hessian: sum of x x^T over calibration tokens, float [I, I].
        group: g.
        top: largest code, 2^N - 1.
        group_grid: makes the grid of one group.

    Returns:
        (W' float32 [O, I], s float32 [O, G], z float32 [O, G]).
    """
    w_OI = weight.float().clone()
    importance_I = hessian.diagonal()
    factor_II = _inverse_factor(hessian)
    scales, zeros = [], []
    for start in range(0, w_OI.shape[1], group):
        end = start + group
        s_O1, z_O1 = group_grid(w_OI[:, start:end].unsqueeze(1), importance_I[start:end].unsqueeze(0))
        for columns in slices(start, end):
            square_BB = factor_II[columns, columns]
            errors = compensate_columns(w_OI[:, columns], square_BB, s_O1[:, 0], z_O1[:, 0], top)
            w_OI[:, columns.stop :] -= errors @ factor_II[columns, columns.stop :]
        scales.append(s_O1)
        zeros.append(z_O1)
    return w_OI, torch.cat(scales, 1), torch.cat(zeros, 1)


def slices(start: int, end: int) -> list[slice]:
    """Cut the columns of a group into parts that are rounded at a time."""
    return [slice(at, min(at + LARGEST, end)) for at in range(start, end, LARGEST)]


def _inverse_factor(hessian: Tensor) -> Tensor:
    """Upper Cholesky factor of the inverse of the damped Hessian, computed in float64, returned in float32."""
    matrix = damp(hessian, DAMPING).double().mT  # column by column, as LAPACK works in place: 6.6 GB of a 70B's widest
    torch.linalg.cholesky(matrix, out=matrix)
    torch.cholesky_inverse(matrix, out=matrix)
    torch.linalg.cholesky(matrix, upper=True, out=matrix)
    return matrix.float()


def damp(hessian: Tensor, fraction: float) -> Tensor:
    """Return the Hessian with `fraction` of its mean diagonal added to the diagonal."""
    damped = hessian.clone()
    damped.diagonal().add_(fraction * hessian.diagonal().mean().clamp(min=1e-12))
    return damped
