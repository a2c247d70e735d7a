"""What the files say of their tensors is compared with the model before a number is read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import eqat_mm
from eqat_mm.errors import CheckpointError
from tests.checkpoint.files import alter_config, alter_header, alter_tensors, assert_four_lines, shard_of

LINEAR = "model.layers.0.mlp.up_proj"
Change = Callable[[dict[str, Tensor]], dict[str, Tensor]]


def refused(folder: Path) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        eqat_mm.load(folder)
    assert_four_lines(caught.value)
    assert str(folder) in caught.value.where
    return caught.value


@pytest.mark.parametrize("leaf", ["weight_packed", "weight_scale", "weight_zero_point"])
def test_a_header_that_turns_shapes_round(folder: Path, leaf: str) -> None:
    """The bytes stay as they are; kernels would read beyond their end."""
    name = f"{LINEAR}.{leaf}"
    alter_header(shard_of(folder, name), lambda header: header[name]["shape"].reverse())
    assert name in refused(folder).given


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": 128},
        {"hidden_size": 32},
        {"intermediate_size": 96},
        {"intermediate_size": 100},
        {"vocab_size": 104},
        {"num_hidden_layers": 1},
        {"num_hidden_layers": 3},
        {"num_hidden_layers": 10**9},
        {"num_key_value_heads": 1},
        {"num_attention_heads": 0},
        {"head_dim": 8},
        {"tie_word_embeddings": "yes"},
        {"hidden_act": "x"},
        {"model_type": "bert"},
        {"model_type": "nothing"},
        {"model_type": None},
        {"attention_bias": True},
        {"rope_parameters": "nope"},
        {"dtype": "float7"},
        {"auto_map": {"AutoConfig": "evil.Config"}, "model_type": "evil"},
    ],
    ids=str,
)
def test_a_config_that_describes_another_model(folder: Path, changes: dict[str, Any]) -> None:
    alter_config(folder, **changes)
    refused(folder)


def without(name: str) -> Change:
    return lambda tensors: {key: value for key, value in tensors.items() if key != name}


def replaced(name: str, change: Callable[[Tensor], Tensor]) -> Change:
    return lambda tensors: tensors | {name: change(tensors[name]).contiguous()}


@pytest.mark.parametrize("leaf", ["weight_packed", "weight_scale", "weight_zero_point", "weight_shape"])
def test_a_missing_part_of_a_packed_linear(folder: Path, leaf: str) -> None:
    name = f"{LINEAR}.{leaf}"
    alter_tensors(shard_of(folder, name), without(name))
    assert LINEAR in refused(folder).given


@pytest.mark.parametrize("name", ["model.norm.weight", "lm_head.weight", "model.embed_tokens.weight"])
def test_a_missing_weight(folder: Path, name: str) -> None:
    alter_tensors(shard_of(folder, name), without(name))
    assert refused(folder).given == f"no tensor {name}"


def test_a_tensor_too_many(folder: Path) -> None:
    shard = shard_of(folder, "lm_head.weight")
    alter_tensors(shard, lambda tensors: tensors | {"model.layers.9.mlp.up_proj.weight": torch.ones(2)})
    assert "no place for: model.layers.9.mlp.up_proj.weight" in refused(folder).given


def test_a_tensor_that_the_model_computes_itself_may_be_there(folder: Path) -> None:
    shard = shard_of(folder, "lm_head.weight")
    alter_tensors(shard, lambda tensors: tensors | {"model.rotary_emb.inv_freq": torch.ones(8)})
    assert not eqat_mm.load(folder).model.rotary_emb.inv_freq.eq(1).all()


@pytest.mark.parametrize(
    ("name", "change"),
    [
        (f"{LINEAR}.weight_packed", lambda t: t.long()),
        (f"{LINEAR}.weight_packed", lambda t: t.view(torch.float32)),
        (f"{LINEAR}.weight_packed", lambda t: t[:, :-1]),
        (f"{LINEAR}.weight_packed", lambda t: t.flatten()),
        (f"{LINEAR}.weight_zero_point", lambda t: t[:0]),
        (f"{LINEAR}.weight_scale", lambda t: t.float()),
        (f"{LINEAR}.weight_scale", lambda t: t[:-1]),
        (f"{LINEAR}.weight_shape", lambda t: t.int()),
        (f"{LINEAR}.weight_shape", lambda t: t.flip(0)),
        ("lm_head.weight", lambda t: t[:-1]),
        ("lm_head.weight", lambda t: t.double()),
        ("lm_head.weight", lambda t: t.to(torch.int8)),
        ("model.norm.weight", lambda t: t.unsqueeze(0)),
    ],
)
def test_another_shape_or_dtype(folder: Path, name: str, change: Callable[[Tensor], Tensor]) -> None:
    alter_tensors(shard_of(folder, name), replaced(name, change))
    assert name in refused(folder).given


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_unquantized_parts_may_have_any_dtype_of_16_or_32_bits(folder: Path, dtype: torch.dtype) -> None:
    name = "model.norm.weight"
    alter_tensors(shard_of(folder, name), replaced(name, lambda t: t.to(dtype)))
    assert eqat_mm.load(folder).model.norm.weight.dtype is torch.float32


def test_step_sizes_of_what_is_no_linear(folder: Path) -> None:
    def move(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name.replace("mlp.up_proj", "mlp.act_fn"): tensor for name, tensor in tensors.items()}

    alter_tensors(shard_of(folder, f"{LINEAR}.weight_scale"), move)
    assert "no linear" in refused(folder).given


def test_two_tensors_for_one_place(folder: Path) -> None:
    shard = shard_of(folder, "lm_head.weight")
    alter_tensors(shard, lambda tensors: tensors | {"norm.weight": torch.ones(64)})
    assert "second tensor" in refused(folder).given
