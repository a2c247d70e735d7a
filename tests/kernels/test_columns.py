"""Rounding columns in turn: every implementation against one row at a time in Python."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

from eqat_kernels import compensate_columns, descend_columns
from eqat_kernels.columns import LARGEST
from tests.tolerances import assert_close

IMPLEMENTATIONS = ["reference", *(["triton"] if os.environ.get("TRITON_INTERPRET") == "1" else [])]
SHAPES = [(1, 1), (5, 3), (40, 32), (17, 37)]
TOP = 3


def problem(rows: int, columns: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return a weight, correlated statistics, step sizes and zero points; the weight is part of a wider one."""
    x_TI = torch.randn(4 * columns + 8, columns)
    x_TI += x_TI.roll(1, 1) / 2
    weight = torch.randn(rows, columns + 6)[:, 2 : columns + 2]
    return weight, x_TI.T @ x_TI, torch.rand(rows) * 0.3 + 0.3, torch.randint(0, TOP + 1, (rows,)).float()


def nearest(steps: float, zero: float) -> float:
    """Return the code nearest to a value in steps, less the zero point."""
    return min(max(round(steps) + zero, 0.0), float(TOP)) - zero


def compensated(row: list[float], factor: list[list[float]], s: float, z: float) -> tuple[list[float], list[float]]:
    """Return a row as its columns were when their turn came, and its errors."""
    row, errors = list(row), []
    for j, across in enumerate(factor):
        errors.append((row[j] - nearest(row[j] / s, z) * s) / across[j])
        for k in range(j + 1, len(row)):
            row[k] -= errors[j] * across[k]
    return row, errors


def descended(
    codes: list[float], left: list[float], h: list[list[float]], s: float, z: float
) -> tuple[list[float], list[float]]:
    """Return the new codes of a row and where their minima were."""
    codes, left, wanted = list(codes), list(left), []
    for j, across in enumerate(h):
        wanted.append(codes[j] + left[j] / (across[j] * s))
        change = nearest(wanted[j], z) - codes[j]
        codes[j] += change
        left = [value - change * s * other for value, other in zip(left, across, strict=True)]
    return codes, wanted


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_compensation(impl: str, shape: tuple[int, int]) -> None:
    weight, hessian, s_O, z_O = problem(*shape)
    factor = torch.linalg.cholesky(torch.linalg.inv(hessian.double()), upper=True).float()
    numbers = zip(weight.tolist(), s_O.tolist(), z_O.tolist(), strict=True)
    expected = [compensated(row, factor.tolist(), s, z) for row, s, z in numbers]
    errors = compensate_columns(weight, factor, s_O, z_O, TOP, impl=impl)
    for found, wanted in zip((weight, errors), zip(*expected, strict=True), strict=True):
        assert_close(found, torch.tensor(wanted), "model", torch.float32)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_descent(impl: str, shape: tuple[int, int]) -> None:
    weight, hessian, s_O, z_O = problem(*shape)
    codes = torch.randint(0, TOP + 1, weight.shape).float() - z_O[:, None]
    residual = (weight - codes * s_O[:, None]) @ hessian
    before = residual.clone()
    numbers = zip(codes.tolist(), residual.tolist(), s_O.tolist(), z_O.tolist(), strict=True)
    expected = [descended(row, left, hessian.tolist(), s, z) for row, left, s, z in numbers]
    minima = descend_columns(codes, residual, hessian, s_O, z_O, TOP, impl=impl)
    new_codes, wanted = zip(*expected, strict=True)
    assert torch.equal(codes, torch.tensor(new_codes))
    assert_close(minima, torch.tensor(wanted), "model", torch.float32)
    assert torch.equal(residual, before), "the residual is only read"


def test_what_does_not_fit_is_refused() -> None:
    weight, square, s_O, z_O = problem(4, 8)
    with pytest.raises(ValueError, match=r"weight: .*4, 129.*, not \[O, 1 to 128\]"):
        compensate_columns(torch.zeros(4, LARGEST + 1), square, s_O, z_O, TOP)
    with pytest.raises(ValueError, match=r"square: .*8, 7.*not \[8, 8\]"):
        compensate_columns(weight, square[:, 1:], s_O, z_O, TOP)
    with pytest.raises(ValueError, match="columns next to each other"):
        compensate_columns(weight.T.contiguous().T, square, s_O, z_O, TOP)
    with pytest.raises(ValueError, match=r"residual: .*float64"):
        descend_columns(weight, weight.double(), square, s_O, z_O, TOP)
    with pytest.raises(ValueError, match=r"zero points: .*\[3\].*not \[4\]"):
        descend_columns(weight, weight, square, s_O, z_O[1:], TOP)


@pytest.mark.gpu
@pytest.mark.parametrize("columns", [37, 64, LARGEST])
def test_on_the_device(columns: int) -> None:
    """A last bit tips a code over now and then, and all columns behind it in that row."""
    weight, hessian, s_O, z_O = problem(700, columns)
    factor = torch.linalg.cholesky(torch.linalg.inv(hessian.double()), upper=True).float()
    codes = torch.randint(0, TOP + 1, weight.shape).float() - z_O[:, None]
    residual = (weight - codes * s_O[:, None]) @ hessian
    found: dict[str, list[Tensor]] = {}
    for device in ("cpu", "cuda"):
        w, f, c, r, h, s, z = (t.clone().to(device) for t in (weight, factor, codes, residual, hessian, s_O, z_O))
        found[device] = [compensate_columns(w, f, s, z, TOP), w, descend_columns(c, r, h, s, z, TOP), c]
    for ours, expected in zip(found["cuda"], found["cpu"], strict=True):
        near = torch.isclose(ours.cpu(), expected, rtol=1e-3, atol=1e-3).all(1)
        assert near.float().mean() > 0.98
