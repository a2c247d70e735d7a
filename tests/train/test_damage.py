"""Damage of rounding a unit, measured and from gradients, against each other and against plain torch."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from eqat_mm.quant.spec import QuantSpec
from eqat_mm.train.damage import damage_by_gradient, damage_by_kl
from llava_adapters.llama import ARCH
from tests.tolerances import assert_close

SPECS = [QuantSpec(2, 32), QuantSpec(3, 32), QuantSpec(8, 32)]


@pytest.fixture
def model(teacher: Any) -> Any:
    return copy.deepcopy(teacher)


def units(model: Any) -> list[list[torch.nn.Linear]]:
    blocks = ARCH.find_blocks(model)
    return [[block.get_submodule(path) for path in stage] for block in blocks for stage in ARCH.stages]  # type: ignore[misc]


@torch.no_grad()
def kl(model: Any, reference: Any, windows: Tensor) -> float:
    log_p, log_q = (each(input_ids=windows).logits[:, :-1].log_softmax(-1) for each in (model, reference))
    return float(functional.kl_div(log_p, log_q, log_target=True, reduction="sum")) / windows[:, 1:].numel()


@pytest.mark.parametrize("rounding", ["minmax", "search"])
def test_more_bits_do_less_damage_and_the_model_is_as_before(
    model: Any, teacher: Any, windows: Tensor, rounding: Any
) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = damage_by_kl(units(model)[:2], SPECS, rounding, lambda: kl(model, teacher, windows[:8]))
    assert len(found) == 2
    assert all(two > three > eight >= 0 for two, three, eight in found)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_gradients_say_about_what_is_measured(model: Any, teacher: Any, windows: Tensor) -> None:
    """Small errors, as the second order holds for, and text drawn often enough."""
    specs = [QuantSpec(4, 32), QuantSpec(8, 32)]
    measured = torch.tensor(damage_by_kl(units(model), specs, "minmax", lambda: kl(model, teacher, windows)))
    found = damage_by_gradient(model, units(model), specs, "minmax", windows.repeat(2, 1), "float32", 0)
    ratios = torch.tensor(found) / measured
    assert ratios.log().abs().max() < 1.0
    assert 0.7 < ratios[:, 0].log().mean().exp() < 1.4
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in model.parameters())


def test_it_is_half_the_square_of_gradient_times_error(model: Any, windows: Tensor) -> None:
    """With one window, rows of one linear by autograd, the drawn tokens found by their seed."""
    (found,) = damage_by_gradient(model, [units(model)[1]], SPECS[:1], "minmax", windows[:1], "float32", 3)
    linear = units(model)[1][0]
    linear.weight.requires_grad_(True)
    logits = model(input_ids=windows[:1]).logits[0, :-1]
    draw = torch.Generator().manual_seed(3)
    labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=draw).squeeze(-1)
    (gradient,) = torch.autograd.grad(functional.cross_entropy(logits, labels, reduction="sum"), linear.weight)
    w = linear.weight.detach().unflatten(1, (-1, 32))
    low, high = w.amin(-1, keepdim=True), w.amax(-1, keepdim=True)
    step = ((high - low) / 3).bfloat16().float()
    zero = (-low / ((high - low) / 3)).round()
    error = (((w / step).round() + zero).clamp(0, 3) - zero) * step - w
    expected = (gradient.unflatten(1, (-1, 32)) * error).flatten(1).sum(1).square().sum() / (2 * 15)
    assert_close(torch.tensor(found), expected.unsqueeze(0), "model")
