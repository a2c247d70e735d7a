"""Exact paths: what is said when one does not resolve."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from eqat_mm.blocks.arch import Arch, set_submodule
from eqat_mm.errors import AdapterError
from tests.blocks.toy import ToyModel

ARCH = Arch(
    name="toy",
    model_types=("toy",),
    auto_class="AutoModelForCausalLM",
    blocks="blocks",
    stages=(("proj",),),
    full_precision=("embed", "norm"),
    tiny=lambda: (ToyModel(), []),
)


def test_blocks_and_linears_are_found() -> None:
    model = ToyModel()
    assert ARCH.find_blocks(model) is model.blocks
    assert ARCH.linears == ("proj",)
    assert ARCH.named_linears(model.blocks[1]) == [("proj", model.blocks[1].proj)]


def test_linears_are_those_of_all_stages_in_order() -> None:
    assert replace(ARCH, stages=(("q", "k"), ("o",))).linears == ("q", "k", "o")


@pytest.mark.parametrize(
    ("change", "path", "near"),
    [
        ({"blocks": "block"}, "block", "blocks"),
        ({"stages": (("projj",),)}, "projj", "proj"),
        ({"full_precision": ("embd",)}, "embd", "embed"),
        ({"blocks": "model.blocks"}, "model.blocks", "blocks"),
        ({"sums": (("proj", "outer"),)}, "outer", ""),
        ({"sums": (("projj", "norm"),)}, "projj", "proj"),
        ({"norms": (("norm", "projj"),)}, "projj", "proj"),
    ],
)
def test_a_wrong_path_lists_near_names(change: dict[str, object], path: str, near: str) -> None:
    with pytest.raises(AdapterError) as caught:
        replace(ARCH, **change).find_blocks(ToyModel())  # type: ignore[arg-type]
    assert "adapter toy" in caught.value.where
    assert repr(path) in caught.value.where
    assert near in caught.value.allowed


def test_paths_match_exactly_and_never_a_part() -> None:
    with pytest.raises(AdapterError):
        ARCH.find(ToyModel(), "locks.0")
    with pytest.raises(AdapterError):
        ARCH.find(ToyModel(), "proj")


def test_a_parameter_is_a_part_of_what_holds_it() -> None:
    model = ToyModel()
    parts = replace(ARCH, full_precision=("embed.weight", "norm")).full_precision_parts(model)
    assert parts == [("embed", model.embed, False), ("norm", model.norm, True)]


@pytest.mark.parametrize("declared", [("embed",), ("embed", "norm.weight")])
def test_a_parameter_in_no_part_is_an_error(declared: tuple[str, ...]) -> None:
    with pytest.raises(AdapterError, match="in no declared part") as caught:
        replace(ARCH, full_precision=declared).find_blocks(ToyModel())
    assert "norm.bias of ToyModel" in caught.value.where


@pytest.mark.parametrize("path", ["embed", "norm", "blocks.0"])
def test_blocks_must_be_a_module_list(path: str) -> None:
    with pytest.raises(AdapterError, match="a ModuleList"):
        replace(ARCH, blocks=path).find_blocks(ToyModel())


def test_a_model_without_blocks() -> None:
    with pytest.raises(AdapterError, match="ModuleList with 0 children"):
        ARCH.find_blocks(ToyModel(depth=0))


def test_only_linears_are_quantized() -> None:
    model = ToyModel()
    set_submodule(model, "blocks.2.proj", nn.LayerNorm(8))
    with pytest.raises(AdapterError) as caught:
        ARCH.find_blocks(model)
    assert caught.value.where == "adapter toy: blocks.2.proj"
    assert caught.value.given == "LayerNorm"


def test_a_submodule_is_replaced_in_place() -> None:
    model = ToyModel()
    linear = nn.Linear(8, 8)
    set_submodule(model, "blocks.1.proj", linear)
    assert model.blocks[1].proj is linear
    root = nn.Sequential(nn.ReLU())
    set_submodule(root, "0", nn.Identity())
    assert torch.equal(root(-torch.ones(1)), -torch.ones(1))
