"""The linear layer that is trained: its parameters, its forward and what bounds it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from eqat_kernels import fake_quantize
from eqat_mm.quant import FakeQuantLinear, QuantSpec
from eqat_mm.quant.fake_linear import project
from eqat_mm.quant.grid import SMALLEST_STEP
from tests.quant.problems import SPECS, random_fake_linear


def identities(parameters: list[nn.Parameter]) -> list[int]:
    return [id(parameter) for parameter in parameters]


@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_the_module_names_its_trainable_parameters(spec: QuantSpec, bias: bool) -> None:
    fake = random_fake_linear(spec, bias=bias)
    assert identities(fake.weight_parameters()) == [id(fake.weight)]
    assert identities(fake.scale_parameters()) == [id(fake.scale)]
    assert identities(fake.zero_point_parameters()) == ([] if spec.symmetric else [id(fake.zero_point)])
    named = fake.weight_parameters() + fake.scale_parameters() + fake.zero_point_parameters()
    assert set(identities(named)) == {id(p) for p in fake.parameters() if p.requires_grad}


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_forward_is_a_linear_on_the_fake_quantized_weight(spec: QuantSpec) -> None:
    fake, x = random_fake_linear(spec), torch.randn(2, 3, 192)
    weight = fake_quantize(fake.weight, fake.scale, fake.zero_point, spec.bits)
    assert torch.equal(fake(x), nn.functional.linear(x, weight, fake.bias))


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_gradients_reach_what_is_trained(spec: QuantSpec) -> None:
    fake = random_fake_linear(spec)
    fake(torch.randn(5, 192)).square().sum().backward()
    for parameter in fake.parameters():
        assert (parameter.grad is not None) == parameter.requires_grad
        assert parameter.grad is None or parameter.grad.any()


def test_a_symmetric_zero_point_survives_training() -> None:
    spec = QuantSpec(2, 32, symmetric=True)
    fake = random_fake_linear(spec)
    optimizer = torch.optim.AdamW([p for p in fake.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        fake(torch.randn(5, 192)).square().sum().backward()
        optimizer.step()
        project([fake])
    assert torch.equal(fake.zero_point, torch.full_like(fake.zero_point, 2.0))


def test_project_bounds_step_sizes_and_zero_points() -> None:
    scale, zero = torch.tensor([[0.5, 0.0, -0.5]]), torch.tensor([[-1.2, 3.4, 1.7]])
    fake = FakeQuantLinear(torch.randn(1, 96), None, scale.clone(), zero.clone(), QuantSpec(2, 32))
    project([fake])
    smallest = torch.tensor(SMALLEST_STEP).item()
    assert fake.scale.tolist() == [[0.5, smallest, smallest]]
    assert torch.equal(fake.zero_point, torch.tensor([[0.0, 3.0, 1.7]]))
    assert fake.scale.requires_grad


def test_project_keeps_the_sign_of_symmetric_step_sizes() -> None:
    spec = QuantSpec(2, 32, symmetric=True)
    fake = FakeQuantLinear(torch.randn(1, 96), None, torch.tensor([[0.5, -1e-12, -0.5]]), torch.full((1, 3), 2.0), spec)
    project([fake])
    assert fake.scale.tolist() == [[0.5, -torch.tensor(SMALLEST_STEP).item(), -0.5]]


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_project_changes_nothing_inside_the_bounds(spec: QuantSpec) -> None:
    fake = random_fake_linear(spec)
    before = {name: tensor.clone() for name, tensor in fake.state_dict().items()}
    project([fake])
    for name, tensor in fake.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_it_prints_its_shape_and_spec() -> None:
    assert "192, 9, w2g32" in repr(random_fake_linear(QuantSpec(2, 32)))
