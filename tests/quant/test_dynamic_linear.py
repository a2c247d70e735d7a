"""Linears with quantized inputs, in training and packed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from eqat_mm.errors import ConfigError
from eqat_mm.quant.activations import fake_quantize_symmetric
from eqat_mm.quant.convert import to_dynamic_fake, to_dynamic_packed
from eqat_mm.quant.dynamic_linear import DynamicPackedLinear
from eqat_mm.quant.packed_linear import PackedLinear
from eqat_mm.quant.spec import QuantSpec
from tests.tolerances import assert_close

SPECS = [QuantSpec(bits, group, symmetric=True) for bits in (2, 3, 4, 8) for group in (-1, 32)]


def linear_of(bias: bool = True) -> nn.Linear:
    return nn.Linear(64, 24, bias=bias)


@pytest.mark.parametrize("activation_bits", [4, 8, 16])
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_the_forward_quantizes_weight_and_input(spec: QuantSpec, activation_bits: int) -> None:
    linear, x = linear_of(), torch.randn(2, 5, 64)
    fake = to_dynamic_fake(linear, spec, activation_bits, layer="layer")
    groups = linear.weight.detach().view(-1, 64 if spec.group_size == -1 else 32)
    weight = fake_quantize_symmetric(groups, spec.bits, torch.bfloat16).view(24, 64)
    wanted = nn.functional.linear(fake_quantize_symmetric(x, activation_bits), weight, linear.bias)
    assert torch.equal(fake(x), wanted)


@pytest.mark.parametrize("activation_bits", [4, 8, 16])
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_packing_changes_neither_weight_nor_output(spec: QuantSpec, activation_bits: int) -> None:
    fake = to_dynamic_fake(linear_of(), spec, activation_bits, layer="layer")
    packed = to_dynamic_packed(fake)
    assert isinstance(packed, DynamicPackedLinear) == (activation_bits < 16)
    w_OGg = fake.weight.detach().unflatten(1, (-1, fake.group))
    weight = fake_quantize_symmetric(w_OGg, spec.bits, torch.bfloat16).flatten(1)
    assert torch.equal(packed.dequantize(), weight)
    x = torch.randn(2, 5, 64)
    assert_close(packed(x), fake(x), "matmul")


def test_weight_and_bias_are_trained_straight_through() -> None:
    linear, x = linear_of(), torch.randn(3, 64, requires_grad=True)
    fake = to_dynamic_fake(linear, QuantSpec(4, -1, symmetric=True), 8, layer="layer")
    assert fake.weight is linear.weight
    assert {id(parameter) for parameter in fake.parameters()} == {id(p) for p in fake.weight_parameters()}
    grad = torch.randn(3, 24)
    fake(x).backward(grad)
    assert linear.weight.grad is not None
    assert x.grad is not None
    assert linear.bias.grad is not None
    assert_close(linear.weight.grad, grad.T @ fake_quantize_symmetric(x.detach(), 8), "gradient")
    assert_close(x.grad, grad @ to_dynamic_packed(fake).dequantize(), "gradient")
    assert_close(linear.bias.grad, grad.sum(0), "gradient")


def test_step_sizes_of_the_packed_linear_can_be_trained() -> None:
    packed = to_dynamic_packed(to_dynamic_fake(linear_of(), QuantSpec(4, 32, symmetric=True), 8, layer="layer"))
    packed(torch.randn(3, 64)).sum().backward()
    assert all(parameter.grad is not None for parameter in packed.scale_parameters())


def test_the_tensors_are_those_of_a_packed_linear() -> None:
    spec = QuantSpec(4, -1, symmetric=True)
    packed = to_dynamic_packed(to_dynamic_fake(linear_of(), spec, 8, layer="layer"))
    plain = PackedLinear(64, 24, spec, bias=True)
    assert {name: value.shape for name, value in packed.state_dict().items()} == {
        name: value.shape for name, value in plain.state_dict().items()
    }


def test_a_group_that_does_not_divide_the_inputs_is_refused() -> None:
    with pytest.raises(ConfigError, match="does not divide in_features=64"):
        to_dynamic_fake(linear_of(), QuantSpec(4, 128, symmetric=True), 8, layer="model.layers.0.mlp.up_proj")
