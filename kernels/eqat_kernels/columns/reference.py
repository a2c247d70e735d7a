"""Rounding columns in turn, in torch: one column of all rows at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from eqat_kernels.levels import round_to_levels


def compensate(w_OB: Tensor, factor_BB: Tensor, s_O: Tensor, z_O: Tensor, top: int) -> Tensor:
    """See `eqat_kernels.columns.compensate_columns`."""
    errors = torch.empty_like(w_OB)
    for j in range(w_OB.shape[1]):
        w_O = w_OB[:, j]
        rounded = round_to_levels(w_O / s_O, z_O, top).mul_(s_O)
        errors[:, j] = (w_O - rounded) / factor_BB[j, j]
        w_OB[:, j + 1 :].addr_(errors[:, j], factor_BB[j, j + 1 :], alpha=-1)
    return errors


def descend(c_OB: Tensor, residual_OB: Tensor, h_BB: Tensor, s_O: Tensor, z_O: Tensor, top: int) -> Tensor:
    """See `eqat_kernels.columns.descend_columns`."""
    r_OB, wanted_OB = residual_OB.clone(), torch.empty_like(c_OB)
    for j in range(c_OB.shape[1]):
        wanted_O = c_OB[:, j] + r_OB[:, j] / (h_BB[j, j] * s_O)
        wanted_OB[:, j] = wanted_O
        rounded_O = round_to_levels(wanted_O, z_O, top)
        r_OB.addr_((rounded_O - c_OB[:, j]) * s_O, h_BB[j], alpha=-1)
        c_OB[:, j] = rounded_O
    return wanted_OB
