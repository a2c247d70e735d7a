"""Rounding some columns of a weight one after another, each with what the earlier ones left over.

The columns belong to one group of the grid, so a row has one step size and one zero point for all of them. Rows do not
know of one another. Both loops are short in arithmetic and long in turns: column by column from Python, a GPU would
wait for the host almost all the time.

Shape letters: O rows, B columns.
"""

from __future__ import annotations

from torch import Tensor

from eqat_kernels.dispatch import implementation, select
from eqat_kernels.sizes import check_columns

LARGEST = 128
"""Columns that are given at a time, at most."""


def compensate_columns(
    weight: Tensor, factor: Tensor, scale: Tensor, zero_point: Tensor, top: int, *, impl: str = "auto"
) -> Tensor:
    """Round columns in their order, and move what each loses onto those behind it (GPTQ, arXiv 2210.17323).

    Args:
        weight: float32 [O, B], columns next to each other; each becomes what it was when its turn came.
        factor: F, float32 [B, B]; column k behind column j gets -error_j F[j, k].
        scale: s, float32 [O].
        zero_point: z, float32 [O], integers.
        top: largest code.
        impl: implementation, see `eqat_kernels.dispatch`.

    Returns:
        (w_j - (q_j - z) s) / F[j, j] for each column j, float32 [O, B].

    Raises:
        ValueError: sizes that do not fit, or `impl` cannot run.
    """
    check_columns({"weight": weight}, factor, scale, zero_point, LARGEST)
    module = implementation("columns", select("columns", impl, weight))
    errors: Tensor = module.compensate(weight, factor, scale, zero_point, top)
    return errors


def descend_columns(
    centred: Tensor,
    residual: Tensor,
    hessian: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    top: int,
    *,
    impl: str = "auto",
) -> Tensor:
    """Round each column to where the error has its minimum with all others as they are (QuantEase, arXiv 2309.01885).

    Args:
        centred: codes less z, float32 [O, B], columns next to each other; replaced by the new ones.
        residual: (W - W_hat) H of these columns, float32 [O, B], columns next to each other.
        hessian: H of these columns, float32 [B, B].
        scale: s, float32 [O].
        zero_point: z, float32 [O], integers.
        top: largest code.
        impl: implementation, see `eqat_kernels.dispatch`.

    Returns:
        The minima before rounding, in steps, float32 [O, B].

    Raises:
        ValueError: sizes that do not fit, or `impl` cannot run.
    """
    check_columns({"centred codes": centred, "residual": residual}, hessian, scale, zero_point, LARGEST)
    module = implementation("columns", select("columns", impl, centred))
    wanted: Tensor = module.descend(centred, residual, hessian, scale, zero_point, top)
    return wanted
