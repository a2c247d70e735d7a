"""The symmetric min-max quantizer: its formula, its bounds, its gradient."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from eqat_mm.quant.activations import fake_quantize_symmetric, largest_code, quantize_symmetric
from eqat_mm.quant.grid import SMALLEST_STEP, smallest_step
from tests.tolerances import assert_close

BITS = (2, 3, 4, 6, 8)


def numbers(*shape: int, spread: float = 6.0) -> Tensor:
    """Rows of very different sizes."""
    return torch.randn(*shape) * torch.logspace(-spread, spread, shape[-2]).unsqueeze(-1)


@pytest.mark.parametrize("bits", BITS)
def test_the_formula_element_by_element(bits: int) -> None:
    x = numbers(5, 7, 12)
    found = fake_quantize_symmetric(x, bits)
    for row, quantized in zip(x.flatten(0, 1), found.flatten(0, 1), strict=True):
        alpha = max(abs(value) for value in row.tolist()) / (2 ** (bits - 1) - 1)
        wanted = torch.tensor([alpha * round(value / alpha) for value in row.tolist()])
        assert_close(quantized, wanted, "elementwise")


@pytest.mark.parametrize("scale_dtype", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", BITS)
def test_codes_stay_in_range_and_numbers_within_half_a_step(bits: int, scale_dtype: torch.dtype | None) -> None:
    x = numbers(400, 33, spread=3.0)
    codes, scale = quantize_symmetric(x, bits, scale_dtype)
    assert torch.equal(codes, codes.round())
    normal = scale.squeeze(-1) > (0 if scale_dtype is None else smallest_step(scale_dtype))  # others were raised to it
    assert torch.equal(codes.abs().amax(-1)[normal], torch.full((400,), float(largest_code(bits)))[normal])
    assert codes.abs().max() <= largest_code(bits)
    assert normal.sum() > 100
    assert ((codes * scale - x).abs() <= scale * 0.5001).all()


def test_a_stored_step_size_is_rounded_before_codes_are_taken() -> None:
    _, scale = quantize_symmetric(numbers(50, 16), 8, torch.bfloat16)
    assert torch.equal(scale, scale.bfloat16().float())


def test_every_token_has_a_step_size_of_its_own() -> None:
    x = torch.randn(3, 5, 16)
    alone = torch.stack([fake_quantize_symmetric(row, 4) for row in x.flatten(0, 1)]).view_as(x)
    assert torch.equal(fake_quantize_symmetric(x, 4), alone)


def test_gradients_go_straight_through() -> None:
    x = torch.randn(4, 8, requires_grad=True)
    grad = torch.randn(4, 8)
    fake_quantize_symmetric(x, 4).backward(grad)
    assert x.grad is not None
    assert torch.equal(x.grad, grad)


def test_zeros_stay_zeros() -> None:
    codes, scale = quantize_symmetric(torch.zeros(2, 4), 8)
    assert not codes.any()
    assert torch.equal(scale, torch.full((2, 1), SMALLEST_STEP))
    assert not fake_quantize_symmetric(torch.zeros(2, 4), 4).any()


def test_sixteen_bits_are_the_tensor_itself() -> None:
    x = torch.randn(2, 4)
    assert fake_quantize_symmetric(x, 16) is x


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_short_floats_are_quantized_in_float32(dtype: torch.dtype) -> None:
    x = torch.randn(6, 16).to(dtype)
    found = fake_quantize_symmetric(x, 8)
    assert found.dtype is dtype
    assert torch.equal(found, fake_quantize_symmetric(x.float(), 8).to(dtype))


def test_the_argument_is_left_alone() -> None:
    x = torch.randn(6, 16)
    before = x.clone()
    quantize_symmetric(x, 4, torch.bfloat16)
    fake_quantize_symmetric(x, 4)
    assert torch.equal(x, before)
