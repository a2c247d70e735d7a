"""Where grids start: the paper's min-max, and the search that may only improve on it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from eqat_mm.errors import ConfigError
from eqat_mm.quant import QuantSpec
from eqat_mm.quant.grid import SMALLEST_STEP, dequantize, quantize
from eqat_mm.quant.init import Grid, Init, initial_grid
from tests.quant.problems import SPECS, correlated_inputs
from tests.tolerances import TOLERANCES, assert_close

ASYMMETRIC = [spec for spec in SPECS if not spec.symmetric]
SYMMETRIC = [spec for spec in SPECS if spec.symmetric]
BITS = (2, 3, 4, 8)
WEIGHTS: dict[str, Callable[[], Tensor]] = {
    "normal": lambda: torch.randn(11, 192),
    "heavy-tailed": lambda: torch.randn(11, 192) ** 3,
    "one-sided": lambda: torch.rand(11, 192) + 0.5,
    "tiny": lambda: torch.randn(11, 192) * 1e-4,
    "outlier": lambda: torch.cat([torch.randn(11, 191), torch.full((11, 1), 30.0)], 1),
    "zero": lambda: torch.zeros(11, 192),
}


def by_name(spec: QuantSpec) -> str:
    return spec.name


def plain_rounding(weight: Tensor, grid: Grid, spec: QuantSpec) -> Tensor:
    """Round W on a grid and return W_hat."""
    return dequantize(quantize(weight, grid.scale, grid.zero_point, spec), grid.scale, grid.zero_point)


def weighted_errors(weight: Tensor, grid: Grid, spec: QuantSpec, importance_I: Tensor) -> Tensor:
    """sum_j h_j (W_hat - W)_j^2 of every group, float64 [O, G]."""
    difference = plain_rounding(weight, grid, spec).double() - weight.double()
    squares_OI = difference.square() * importance_I.double()
    return squares_OI.view(len(weight), grid.scale.shape[1], -1).sum(-1)


@pytest.mark.parametrize("spec", ASYMMETRIC, ids=by_name)
def test_minmax_is_the_papers(spec: QuantSpec) -> None:
    weight = torch.randn(7, 192)
    grid = initial_grid(weight, spec, layer="layer", init="minmax")
    group = spec.group_of(192, "layer")
    assert grid.scale.shape == grid.zero_point.shape == (7, 192 // group)
    assert grid.weight is None
    for row in range(7):
        for index in range(192 // group):
            values = weight[row, index * group : (index + 1) * group].tolist()
            step = (max(values) - min(values)) / (2**spec.bits - 1)
            assert grid.scale[row, index].item() == pytest.approx(step, rel=TOLERANCES["elementwise"][torch.float32])
            assert grid.zero_point[row, index].item() == round(-min(values) / step)


@pytest.mark.parametrize("spec", SYMMETRIC, ids=by_name)
def test_symmetric_minmax_represents_the_largest_weight(spec: QuantSpec) -> None:
    weight = torch.randn(7, 192)
    grid = initial_grid(weight, spec, layer="layer", init="minmax")
    assert torch.equal(grid.zero_point, torch.full_like(grid.scale, 2 ** (spec.bits - 1)))
    assert (grid.scale < 0).any()
    assert (grid.scale > 0).any()
    w_OGg = weight.unflatten(1, (grid.scale.shape[1], -1))
    codes_OGg = quantize(weight, grid.scale, grid.zero_point, spec).view_as(w_OGg)
    largest = w_OGg.abs().argmax(-1, keepdim=True)
    assert not codes_OGg.gather(-1, largest).any()
    w_hat_OGg = plain_rounding(weight, grid, spec).view_as(w_OGg)
    assert_close(w_hat_OGg.gather(-1, largest), w_OGg.gather(-1, largest), "elementwise")


@pytest.mark.parametrize("init", ["minmax", "search", "gptq", "refined"])
@pytest.mark.parametrize("spec", SPECS, ids=by_name)
def test_a_group_of_zeros_stays_zero(spec: QuantSpec, init: Init) -> None:
    grid = initial_grid(torch.zeros(3, 192), spec, layer="layer", init=init, hessian=torch.eye(192))
    assert (grid.scale.abs() >= SMALLEST_STEP).all()
    assert grid.zero_point.isfinite().all()
    assert not plain_rounding(torch.zeros(3, 192), grid, spec).any()


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("bits", BITS)
def test_a_one_sided_group_has_zero_at_its_end(bits: int, sign: float) -> None:
    spec = QuantSpec(bits, 32)
    weight = sign * (torch.rand(5, 64) + 0.5)
    grid = initial_grid(weight, spec, layer="layer", init="minmax")
    assert torch.equal(grid.zero_point, torch.full((5, 2), 0.0 if sign > 0 else spec.top))
    assert_close(grid.scale, weight.abs().unflatten(1, (2, 32)).amax(-1) / spec.top, "elementwise")


@pytest.mark.parametrize("value", [0.7, -0.7, 1e-3])
@pytest.mark.parametrize("symmetric", [False, True], ids=["asymmetric", "symmetric"])
@pytest.mark.parametrize("init", ["minmax", "search"])
@pytest.mark.parametrize("bits", BITS)
def test_a_constant_group_is_represented(bits: int, init: Init, symmetric: bool, value: float) -> None:
    spec, weight = QuantSpec(bits, 32, symmetric), torch.full((3, 64), value)
    grid = initial_grid(weight, spec, layer="layer", init=init, hessian=torch.eye(64))
    assert_close(plain_rounding(weight, grid, spec), weight, "elementwise")


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("spec", SPECS, ids=by_name)
def test_search_is_never_worse_than_minmax(spec: QuantSpec, kind: str) -> None:
    for _ in range(3):
        weight, importance_I = WEIGHTS[kind](), torch.rand(192) ** 4 * 100
        hessian = torch.diag(importance_I)
        errors = {}
        inits: tuple[Init, ...] = ("minmax", "search")
        for init in inits:
            grid = initial_grid(weight, spec, layer="layer", init=init, hessian=hessian)
            errors[init] = weighted_errors(weight, grid, spec, importance_I)
        slack = 1 + TOLERANCES["gradient"][torch.float32]  # both errors are sums in float32
        assert (errors["search"] <= errors["minmax"] * slack).all()


@pytest.mark.parametrize(("symmetric", "at_most"), [(False, 0.6), (True, 0.85)], ids=["asymmetric", "symmetric"])
def test_search_gains_much_at_two_bits(symmetric: bool, at_most: float) -> None:
    spec, weight = QuantSpec(2, 64, symmetric), torch.randn(32, 192)
    ones_I = torch.ones(192)
    search = initial_grid(weight, spec, layer="layer", init="search", hessian=torch.eye(192))
    minmax = initial_grid(weight, spec, layer="layer", init="minmax")
    gain = weighted_errors(weight, search, spec, ones_I).sum() / weighted_errors(weight, minmax, spec, ones_I).sum()
    assert gain < at_most


@pytest.mark.parametrize("spec", SPECS, ids=by_name)
def test_search_gives_a_grid_that_can_be_stored(spec: QuantSpec) -> None:
    weight = torch.randn(11, 192) ** 3
    grid = initial_grid(weight, spec, layer="layer", init="search", hessian=torch.diag(torch.rand(192)))
    assert torch.equal(grid.zero_point, grid.zero_point.round().clamp(0, spec.top))
    assert spec.symmetric or (grid.scale > 0).all()
    assert not spec.symmetric or (grid.zero_point == spec.middle).all()


def test_search_follows_the_importance() -> None:
    spec, weight = QuantSpec(2, 32), torch.randn(16, 32)
    importance_I = torch.full((32,), 1e-4)
    importance_I[:3] = 1.0
    grid = initial_grid(weight, spec, layer="layer", init="search", hessian=torch.diag(importance_I))
    even = initial_grid(weight, spec, layer="layer", init="search", hessian=torch.eye(32))
    weighted = weighted_errors(weight, grid, spec, importance_I).sum()
    assert weighted < 0.5 * weighted_errors(weight, even, spec, importance_I).sum()


def test_channels_without_inputs_leave_the_search_finite() -> None:
    spec, weight = QuantSpec(2, 32), torch.randn(5, 96)
    importance_I = torch.cat([torch.zeros(32), torch.ones(16), torch.zeros(16), torch.ones(32)])
    grid = initial_grid(weight, spec, layer="layer", init="search", hessian=torch.diag(importance_I))
    assert grid.scale.isfinite().all()
    assert plain_rounding(weight, grid, spec).isfinite().all()


@pytest.mark.parametrize("init", ["minmax", "search", "gptq", "refined"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_grids_are_float32_and_the_weight_is_left_alone(dtype: torch.dtype, init: Init) -> None:
    weight = torch.randn(5, 64).to(dtype)
    before = weight.clone()
    x_TI = correlated_inputs(128, 64)
    grid = initial_grid(weight, QuantSpec(2, 32), layer="layer", init=init, hessian=x_TI.T @ x_TI)
    assert all(tensor is None or tensor.dtype is torch.float32 for tensor in grid)
    assert torch.equal(weight, before)


def test_a_group_that_does_not_divide_names_the_layer() -> None:
    with pytest.raises(ConfigError, match=r"layers\.3\.up_proj"):
        initial_grid(torch.randn(4, 80), QuantSpec(2, 32), layer="layers.3.up_proj", init="minmax")


@pytest.mark.parametrize("spec", SPECS, ids=by_name)
def test_groups_that_no_input_reaches_keep_the_full_range(spec: QuantSpec) -> None:
    weight = torch.randn(7, 192)
    full = initial_grid(weight, spec, layer="layer", init="minmax")
    searched = initial_grid(weight, spec, layer="layer", init="search", hessian=torch.zeros(192, 192))
    assert torch.equal(searched.scale, full.scale)
    assert torch.equal(searched.zero_point, full.zero_point)
