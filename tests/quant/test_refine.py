"""Refinement of rounded layers: the error it lowers, and what it hands on."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from eqat_mm.quant import QuantSpec
from eqat_mm.quant.gptq import damp
from eqat_mm.quant.grid import dequantize, quantize
from eqat_mm.quant.init import Grid, Init, initial_grid
from eqat_mm.quant.refine import DAMPING, LARGEST_CHANGE, refine
from tests.quant.problems import correlated_inputs, squared_error
from tests.tolerances import assert_close

SPECS = [QuantSpec(2, 32), QuantSpec(3, 64), QuantSpec(4, -1), QuantSpec(2, 32, symmetric=True)]


def by_name(spec: QuantSpec) -> str:
    return spec.name


def grid_of(weight: Tensor, spec: QuantSpec, hessian: Tensor, init: Init) -> tuple[Grid, Tensor, Tensor]:
    """Return a grid, its codes less z, and W_hat."""
    grid = initial_grid(weight, spec, layer="layer", init=init, hessian=hessian)
    assert grid.weight is not None
    codes = quantize(grid.weight, grid.scale, grid.zero_point, spec)
    group = weight.shape[1] // grid.scale.shape[1]
    centred = codes.float() - grid.zero_point.repeat_interleave(group, 1)
    return grid, centred, dequantize(codes, grid.scale, grid.zero_point)


@pytest.mark.parametrize("spec", SPECS, ids=by_name)
def test_it_beats_gptq(spec: QuantSpec) -> None:
    weight, x_TI = torch.randn(24, 128), correlated_inputs(512, 128)
    errors = {}
    for init in ("gptq", "refined"):
        _, _, rounded = grid_of(weight, spec, x_TI.T @ x_TI, init)  # type: ignore[arg-type]
        errors[init] = squared_error(rounded, weight, x_TI)
    assert errors["refined"] < 0.95 * errors["gptq"]


@pytest.mark.parametrize("spec", SPECS, ids=by_name)
def test_no_code_can_be_changed_by_one_for_a_smaller_error(spec: QuantSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    """After enough rounds each column is at its minimum, all others as they are."""
    monkeypatch.setattr("eqat_mm.quant.refine.ROUNDS", 60)
    weight, x_TI = torch.randn(3, 64), correlated_inputs(256, 64)
    hessian = damp(x_TI.T @ x_TI, DAMPING).double()
    grid, centred, _ = grid_of(weight, spec, x_TI.T @ x_TI, "refined")
    group = 64 // grid.scale.shape[1]
    s_OI, z_OI = (each.double().repeat_interleave(group, 1) for each in (grid.scale, grid.zero_point))

    def errors(c_OI: Tensor) -> Tensor:
        d_OI = weight.double() - c_OI * s_OI
        return torch.einsum("oi,ij,oj->o", d_OI, hessian, d_OI)

    best_O = errors(centred.double())
    for column in range(64):
        for change in (-1, 1):
            other = centred.double().clone()
            other[:, column] = (other[:, column] + change + z_OI[:, column]).clamp(0, spec.top) - z_OI[:, column]
            assert (errors(other) >= best_O * (1 - 1e-5)).all()


def test_step_sizes_are_the_least_squares_ones_of_their_codes() -> None:
    from eqat_mm.quant.refine import _refit

    spec, weight, x_TI = QuantSpec(3, 32), torch.randn(5, 96), correlated_inputs(256, 96)
    hessian = x_TI.T @ x_TI
    grid, c_OI, _ = grid_of(weight, spec, hessian, "gptq")
    fitted = _refit(c_OI, weight @ hessian, hessian, grid.scale)
    for row in range(5):
        basis_TG = torch.stack([x_TI[:, k : k + 32] @ c_OI[row, k : k + 32] for k in range(0, 96, 32)], 1).double()
        expected_G = torch.linalg.lstsq(basis_TG, (x_TI @ weight[row]).double()).solution
        assert_close(fitted[row].double(), expected_G, "model", torch.float32)


def test_a_step_size_without_a_usable_fit_is_kept() -> None:
    weight = torch.randn(2, 64)
    start, scale = torch.zeros(2, 64), torch.full((2, 2), 0.1)  # codes that say nothing about a step size
    _, kept = refine(weight, start, scale, torch.full((2, 2), 2.0), torch.eye(64), 3)
    assert (kept / scale < LARGEST_CHANGE).all()
    assert (kept / scale > 1 / LARGEST_CHANGE).all()


def test_its_weight_rounds_to_its_codes_and_stays_near_the_grid() -> None:
    spec, weight, x_TI = QuantSpec(2, 32), torch.randn(8, 64), correlated_inputs(256, 64)
    grid, centred, _ = grid_of(weight, spec, x_TI.T @ x_TI, "refined")
    assert grid.weight is not None
    u_OI = grid.weight / grid.scale.repeat_interleave(32, 1)
    inside = (centred + grid.zero_point.repeat_interleave(32, 1) - spec.top / 2).abs() < spec.top / 2
    assert ((u_OI - centred).abs()[inside] <= 0.5).all()


def test_arguments_are_left_alone() -> None:
    weight, x_TI = torch.randn(4, 64), correlated_inputs(128, 64)
    arguments = weight, weight * 1.1, torch.full((4, 2), 0.7), torch.full((4, 2), 2.0), x_TI.T @ x_TI
    before = [each.clone() for each in arguments]
    refine(*arguments, 3)
    assert all(torch.equal(a, b) for a, b in zip(arguments, before, strict=True))


def test_rows_solved_some_at_a_time_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x_TI = torch.randn(24, 128), correlated_inputs(512, 128)
    spec, hessian = QuantSpec(2, 32), x_TI.T @ x_TI
    grid, _, rounded = grid_of(weight, spec, hessian, "refined")
    monkeypatch.setattr("eqat_mm.quant.refine.SYSTEMS", 5 * 4**2)  # five rows: 24 are not a multiple
    other, _, others = grid_of(weight, spec, hessian, "refined")
    assert_close(other.scale, grid.scale, "elementwise")
    assert_close(others, rounded, "elementwise")
