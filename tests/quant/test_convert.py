"""From nn.Linear to the trained layer, to the stored one, to a dense one: nothing changes that should not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from eqat_kernels import fake_quantize, unpack
from eqat_mm.quant import FakeQuantLinear, PackedLinear, QuantSpec
from eqat_mm.quant.convert import to_fake, to_packed
from eqat_mm.quant.fake_linear import project
from eqat_mm.quant.grid import quantize, smallest_step
from eqat_mm.quant.init import initial_grid
from tests.quant.problems import SPECS, correlated_inputs, random_fake_linear
from tests.tolerances import assert_close


def codes_of(packed: PackedLinear) -> Tensor:
    return unpack(packed.weight_packed, packed.spec.bits, packed.layout.in_features)


def rounded_scale(fake: FakeQuantLinear) -> Tensor:
    return fake.scale.detach().to(fake.spec.storage_dtype).float()


@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_to_fake_copies_the_weight(dtype: torch.dtype, bias: bool) -> None:
    spec, linear = QuantSpec(2, 32), nn.Linear(64, 5, bias=bias, dtype=dtype)
    grid = initial_grid(linear.weight, spec, layer="layer", init="minmax")
    fake = to_fake(linear, grid, spec)
    assert torch.equal(fake.weight, linear.weight.float())
    assert fake.weight.dtype is torch.float32
    assert fake.weight.data_ptr() != linear.weight.data_ptr()
    assert torch.equal(fake.scale, grid.scale)
    assert torch.equal(fake.zero_point, grid.zero_point)
    assert (fake.bias is not None) == bias
    assert fake.bias is None or torch.equal(fake.bias, linear.bias)


def test_to_fake_starts_from_a_compensated_weight() -> None:
    spec, linear, x_TI = QuantSpec(2, 32), nn.Linear(64, 5), correlated_inputs(128, 64)
    grid = initial_grid(linear.weight, spec, layer="layer", init="gptq", hessian=x_TI.T @ x_TI)
    assert grid.weight is not None
    fake = to_fake(linear, grid, spec)
    assert torch.equal(fake.weight, grid.weight)
    assert not torch.equal(fake.weight, linear.weight)


@pytest.mark.parametrize("rows", [1, 9, 40])
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_packing_keeps_the_fake_quantized_weight(spec: QuantSpec, rows: int) -> None:
    fake = random_fake_linear(spec, rows)
    packed = to_packed(fake)
    scale = rounded_scale(fake)
    assert torch.equal(packed.weight_scale, scale)
    assert torch.equal(codes_of(packed), quantize(fake.weight.detach(), scale, fake.zero_point.detach(), spec))
    assert torch.equal(packed.dequantize(), fake_quantize(fake.weight, scale, fake.zero_point, spec.bits))


@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_packing_keeps_the_output(spec: QuantSpec, bias: bool) -> None:
    fake, x = random_fake_linear(spec, bias=bias), torch.randn(2, 3, 192)
    with torch.no_grad():
        fake.scale.copy_(rounded_scale(fake))
    packed = to_packed(fake)
    assert (packed.bias is not None) == bias
    assert_close(packed(x), fake(x), "matmul")


def test_zero_points_outside_the_range_are_clamped_before_codes_are_taken() -> None:
    spec, fake = QuantSpec(2, 32), random_fake_linear(QuantSpec(2, 32))
    with torch.no_grad():
        fake.zero_point.add_(torch.randn_like(fake.zero_point) * 4)
    packed = to_packed(fake)
    project([fake])
    assert torch.equal(packed.dequantize(), fake_quantize(fake.weight, rounded_scale(fake), fake.zero_point, spec.bits))


@pytest.mark.parametrize("symmetric", [False, True], ids=["asymmetric", "symmetric"])
@pytest.mark.parametrize("scale_dtype", ["bfloat16", "float16"])
def test_step_sizes_too_small_to_store_give_finite_weights(scale_dtype: str, symmetric: bool) -> None:
    spec = QuantSpec(2, 32, symmetric, scale_dtype)  # type: ignore[arg-type]
    fake = random_fake_linear(spec)
    with torch.no_grad():
        fake.scale.fill_(1e-30)
    with pytest.warns(UserWarning, match="are raised to it"):
        weight = to_packed(fake).dequantize()
    assert weight.isfinite().all()
    assert 0 < weight.abs().max() <= spec.top * smallest_step(spec.storage_dtype) * 1.01


@pytest.mark.parametrize("symmetric", [False, True], ids=["asymmetric", "symmetric"])
def test_weights_too_small_for_float16_beside_outliers(symmetric: bool) -> None:
    """Groups of zeros lose nothing and are not mentioned; small ones are, and neither has a step size of zero."""
    spec = QuantSpec(8, 32, symmetric, scale_dtype="float16")
    linear = nn.Linear(96, 4, bias=False)
    with torch.no_grad():
        linear.weight[:, 32:64].zero_()
        linear.weight[0, 0] = 1e4
    grid = initial_grid(linear.weight, spec, layer="a", init="minmax")
    packed = to_packed(to_fake(linear, grid, spec))
    error = (packed.dequantize() - linear.weight).abs().unflatten(1, (3, 32)).amax(-1)
    assert (error <= packed.weight_scale.abs() * 1.01).all()
    assert packed.weight_scale.abs().min() == torch.finfo(torch.float16).smallest_normal
    with torch.no_grad():
        linear.weight[1, 64:] *= 1e-4
    with pytest.warns(UserWarning, match="--quant.scale_dtype bfloat16 keeps them"):
        again = to_packed(to_fake(linear, initial_grid(linear.weight, spec, layer="a", init="minmax"), spec))
    assert again.weight_scale.abs().min() == torch.finfo(torch.float16).smallest_normal


def test_packing_leaves_the_trained_layer_alone() -> None:
    fake = random_fake_linear(QuantSpec(2, 32))
    before = {name: tensor.clone() for name, tensor in fake.state_dict().items()}
    to_packed(fake)
    for name, tensor in fake.state_dict().items():
        assert torch.equal(tensor, before[name])
