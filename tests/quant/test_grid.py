"""Codes and weights of a grid against the equations element by element."""

from __future__ import annotations

import pytest
import torch

from eqat_kernels import fake_quantize
from eqat_mm.quant import QuantSpec
from eqat_mm.quant.grid import SMALLEST_STEP, as_stored, away_from_zero, dequantize, quantize, smallest_step
from tests.quant.problems import SPECS, random_fake_linear


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_codes_are_those_of_equation_1(spec: QuantSpec) -> None:
    fake = random_fake_linear(spec)
    weight, scale, zero = (p.detach().double() for p in (fake.weight, fake.scale, fake.zero_point))
    codes = quantize(weight, scale, zero, spec)
    group = spec.group_of(192, "layer")
    for row in range(9):
        for column in range(192):
            s, z = scale[row, column // group].item(), zero[row, column // group].item()
            code = min(max(round(weight[row, column].item() / s) + round(z), 0), 2**spec.bits - 1)
            assert codes[row, column] == code
    assert codes.dtype is torch.uint8


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_codes_dequantize_to_the_fake_quantized_weight(spec: QuantSpec) -> None:
    fake = random_fake_linear(spec)
    weight, scale, zero = (p.detach() for p in (fake.weight, fake.scale, fake.zero_point))
    weight_before = weight.clone()
    w_hat = dequantize(quantize(weight, scale, zero, spec), scale, zero)
    assert torch.equal(w_hat, fake_quantize(weight, scale, zero, spec.bits))
    assert torch.equal(weight, weight_before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_away_from_zero(dtype: torch.dtype) -> None:
    smallest = torch.tensor(SMALLEST_STEP, dtype=dtype).item()
    scale = torch.tensor([0.5, 0.0, -0.0, 1e-12, -1e-12, -0.5], dtype=dtype)
    signed, unsigned = away_from_zero(scale, signed=True), away_from_zero(scale, signed=False)
    assert signed.tolist() == [0.5, smallest, smallest, smallest, -smallest, -0.5]
    assert unsigned.tolist() == [0.5, *[smallest] * 5]
    assert signed.dtype is unsigned.dtype is dtype


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("scale_dtype", ["bfloat16", "float16"])
def test_no_step_size_is_stored_as_zero_or_with_fewer_digits(scale_dtype: str, symmetric: bool) -> None:
    spec = QuantSpec(2, 32, symmetric, scale_dtype)  # type: ignore[arg-type]
    small = [0.0, 1e-40, 1e-12, 1e-8, 5e-8, 3e-5, 6e-5]
    scale = torch.tensor([[*small, *(-value for value in small), 0.1, 3e4]])
    stored = as_stored(scale, spec)
    assert stored.dtype is spec.storage_dtype
    assert (stored.abs() >= torch.tensor(smallest_step(spec.storage_dtype)).to(spec.storage_dtype)).all()
    assert torch.equal(stored[0, -2:], scale[0, -2:].to(spec.storage_dtype))
    assert torch.equal(as_stored(stored.float(), spec), stored)
    assert (stored[0, 9:14] < 0).all() == symmetric


def test_what_is_not_finite_is_left_to_be_refused() -> None:
    spec = QuantSpec(2, 32, scale_dtype="float16")
    assert as_stored(torch.tensor([torch.nan, torch.inf, 1e6]), spec).isfinite().sum() == 0
