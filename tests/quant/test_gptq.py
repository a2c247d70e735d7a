"""GPTQ as a warm start: its codes, and what they do to the output of the layer."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from eqat_mm.quant import QuantSpec
from eqat_mm.quant.gptq import DAMPING, damp
from eqat_mm.quant.grid import dequantize, quantize
from eqat_mm.quant.init import Grid, initial_grid
from tests.quant.problems import correlated_inputs, squared_error
from tests.tolerances import assert_close

SPECS = [QuantSpec(2, 32), QuantSpec(3, 64), QuantSpec(4, -1), QuantSpec(2, 32, symmetric=True)]


def rounded(weight: Tensor, grid: Grid, spec: QuantSpec) -> Tensor:
    """Round W on a grid and return W_hat."""
    return dequantize(quantize(weight, grid.scale, grid.zero_point, spec), grid.scale, grid.zero_point)


def gptq_grid(weight: Tensor, spec: QuantSpec, hessian: Tensor) -> tuple[Grid, Tensor]:
    """Return the GPTQ grid and its compensated weight."""
    grid = initial_grid(weight, spec, layer="layer", init="gptq", hessian=hessian)
    assert grid.weight is not None
    return grid, grid.weight


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_compensation_beats_plain_rounding_on_correlated_inputs(spec: QuantSpec) -> None:
    weight, x_TI = torch.randn(24, 128), correlated_inputs(512, 128)
    grid, compensated = gptq_grid(weight, spec, x_TI.T @ x_TI)
    search = initial_grid(weight, spec, layer="layer", init="search", hessian=x_TI.T @ x_TI)
    error = squared_error(rounded(compensated, grid, spec), weight, x_TI)
    assert error < 0.5 * squared_error(rounded(weight, grid, spec), weight, x_TI)
    assert error < 0.5 * squared_error(rounded(weight, search, spec), weight, x_TI)


def test_the_compensation_is_that_of_the_textbook() -> None:
    """Optimal brain surgeon, one column at a time: after fixing a column, the rest moves to the least-squares best."""
    spec, weight, x_TI = QuantSpec(3, 32), torch.randn(4, 64), correlated_inputs(256, 64)
    hessian = x_TI.T @ x_TI
    grid, compensated = gptq_grid(weight, spec, hessian)
    damped = damp(hessian, DAMPING).double()
    fixed = rounded(compensated, grid, spec).double()
    w_OI = weight.double()
    for column in (1, 2, 31, 32, 33, 63):
        done, rest = slice(0, column), slice(column, None)
        moved = -(fixed[:, done] - w_OI[:, done]) @ damped[done, rest] @ torch.linalg.inv(damped[rest, rest])
        # the weight of a column is final when its turn comes; float32 works through up to 63 updates until then
        assert_close(compensated[:, column].double(), (w_OI[:, rest] + moved)[:, 0], "model", torch.float32)


def test_an_identity_hessian_gives_plain_rounding() -> None:
    weight = torch.randn(9, 96)
    for spec in (QuantSpec(2, 32), QuantSpec(3, -1, symmetric=True)):
        grid, compensated = gptq_grid(weight, spec, torch.eye(96) * 7)
        search = initial_grid(weight, spec, layer="layer", init="search", hessian=torch.eye(96) * 7)
        assert torch.equal(compensated, weight)
        assert torch.equal(grid.scale, search.scale)
        assert torch.equal(grid.zero_point, search.zero_point)


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
@pytest.mark.parametrize("dead", [slice(0, 1), slice(5, 60), slice(32, 64), slice(0, 128)], ids=str)
def test_dead_channels_stay_finite(spec: QuantSpec, dead: slice) -> None:
    weight, x_TI = torch.randn(6, 128), correlated_inputs(64, 128)
    x_TI[:, dead] = 0
    grid, compensated = gptq_grid(weight, spec, x_TI.T @ x_TI)
    for tensor in (grid.scale, grid.zero_point, compensated, rounded(compensated, grid, spec)):
        assert tensor.isfinite().all()


def test_fewer_tokens_than_channels_stay_finite_and_helpful() -> None:
    spec, weight, x_TI = QuantSpec(2, 32), torch.randn(6, 128), correlated_inputs(16, 128)
    grid, compensated = gptq_grid(weight, spec, x_TI.T @ x_TI)
    assert compensated.isfinite().all()
    plain = squared_error(rounded(weight, grid, spec), weight, x_TI)
    assert squared_error(rounded(compensated, grid, spec), weight, x_TI) < 0.5 * plain


def test_the_arguments_are_left_alone() -> None:
    weight, x_TI = torch.randn(6, 64), correlated_inputs(64, 64)
    hessian = x_TI.T @ x_TI
    copies = weight.clone(), hessian.clone()
    gptq_grid(weight, QuantSpec(2, 32), hessian)
    assert torch.equal(weight, copies[0])
    assert torch.equal(hessian, copies[1])


def test_damping_adds_a_fraction_of_the_mean_diagonal() -> None:
    hessian = torch.diag(torch.tensor([1.0, 3.0]))
    assert torch.equal(damp(hessian, 0.5), torch.diag(torch.tensor([2.0, 4.0])))
    assert (damp(torch.zeros(2, 2), 0.01).diagonal() > 0).all()
