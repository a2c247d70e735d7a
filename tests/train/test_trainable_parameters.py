"""Which parameters of a block are trained, and with which learning rate."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from eqat_mm.blocks.walker import BlockStep, BlockWalker
from eqat_mm.quant.spec import QuantSpec
from eqat_mm.train.fit import FitConfig, fit_block, trainable_parameters
from tests.train.problems import step_to_fit, values_of

LINEARS = [f"self_attn.{x}_proj" for x in "qkvo"] + [f"mlp.{x}_proj" for x in ("gate", "up", "down")]
NORMS = {"input_layernorm.weight", "post_attention_layernorm.weight"}


def named_groups(block: nn.Module, config: FitConfig) -> dict[float, set[str]]:
    """Names of the parameters by learning rate."""
    names = {id(parameter): name for name, parameter in block.named_parameters()}
    groups = trainable_parameters(block, config)
    return {group["lr"]: {names[id(parameter)] for parameter in group["params"]} for group in groups}


def of_linears(leaf: str) -> set[str]:
    return {f"{path}.{leaf}" for path in LINEARS}


def trainable(block: nn.Module) -> set[str]:
    return {name for name, parameter in block.named_parameters() if parameter.requires_grad}


def test_each_kind_has_its_own_learning_rate(step: BlockStep) -> None:
    config = FitConfig(lr_weight=1.0, lr_scale=2.0, lr_zero_point=3.0, lr_norm=4.0)
    expected = {
        1.0: of_linears("weight"),
        2.0: of_linears("scale"),
        3.0: of_linears("zero_point"),
        4.0: NORMS,
    }
    assert named_groups(step.block, config) == expected
    assert trainable(step.block) == set.union(*expected.values())


def test_the_symmetric_grid_trains_no_zero_points(walker: BlockWalker) -> None:
    step = step_to_fit(walker, QuantSpec(bits=3, group_size=32, symmetric=True))
    before = values_of(step.block)
    config = FitConfig(lr_weight=1.0, lr_scale=2.0, lr_zero_point=3.0, lr_norm=4.0)
    assert named_groups(step.block, config).keys() == {1.0, 2.0, 4.0}
    assert trainable(step.block) == of_linears("weight") | of_linears("scale") | NORMS
    report = fit_block(walker, step, FitConfig(epochs=2, lr_weight=1e-3, validation_samples=0), seed=0)
    assert report.loss_after < report.loss_before
    assert all(torch.equal(step.block.state_dict()[name], before[name]) for name in of_linears("zero_point"))


def test_rates_that_are_not_given_follow_another(step: BlockStep) -> None:
    groups = trainable_parameters(step.block, FitConfig(lr_weight=1.0, lr_scale=2.0, weight_decay=0.5))
    assert [(group["lr"], group["weight_decay"]) for group in groups] == [
        (1.0, 0.5),
        (2.0, 0.0),
        (2.0, 0.0),
        (1.0, 0.0),
    ]


@pytest.mark.parametrize(
    ("off", "frozen"),
    [
        ({"lr_weight": 0.0}, of_linears("weight")),
        ({"lr_scale": 0.0}, of_linears("scale")),
        ({"lr_zero_point": 0.0}, of_linears("zero_point")),
        ({"lr_norm": 0.0}, NORMS),
    ],
    ids=["weight", "scale", "zero point", "norm"],
)
def test_what_has_no_learning_rate_is_frozen(
    walker: BlockWalker, step: BlockStep, off: dict[str, Any], frozen: set[str]
) -> None:
    before = values_of(step.block)
    rates = {"lr_weight": 2e-3, "lr_scale": 1e-3, "lr_zero_point": 1e-2, "lr_norm": 1e-3} | off
    fit_block(walker, step, FitConfig(epochs=1, validation_samples=0, **rates), seed=0)
    after = values_of(step.block)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert changed.isdisjoint(frozen)
    assert trainable(step.block) == before.keys() - frozen
