"""Weights come from safetensors when they are needed, under the names of the modules."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaForCausalLM

from eqat_mm.blocks.arch import Inputs
from eqat_mm.blocks.source import INDEX, SINGLE, WeightSource, open_model
from eqat_mm.blocks.walker import capture_front
from eqat_mm.errors import AdapterError, CheckpointError
from eqat_mm.runtime.files import read_json
from llava_adapters import arch_for
from tests.tiny_model import tiny_llama

CPU = torch.device("cpu")
LLAMA = arch_for("llama")
TOKENS = torch.arange(12).view(2, 6)


def tiny(tie: bool = False) -> LlamaForCausalLM:
    """Return a random two-block Llama."""
    model: LlamaForCausalLM = tiny_llama(tie_word_embeddings=tie).eval()
    return model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model in several shards."""
    tiny().save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    return tmp_path


def shard_of(folder: Path, name: str) -> Path:
    shard: str = read_json(folder / INDEX)["weight_map"][name]
    return folder / shard


def test_every_tensor_is_read_in_its_dtype(tmp_path: Path) -> None:
    model = tiny()
    nn.Module.to(model, torch.bfloat16)
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    source = WeightSource(tmp_path)
    assert set(source.names()) == set(model.state_dict())
    for name, tensor in model.state_dict().items():
        assert name in source
        assert source.read(name).dtype is torch.bfloat16
        assert torch.equal(source.read(name), tensor)


def test_a_single_file_needs_no_index(tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path)
    assert not (tmp_path / INDEX).exists()
    assert "lm_head.weight" in WeightSource(tmp_path)
    assert "lm_head.weight" in WeightSource.names_of(tmp_path / SINGLE)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        lambda path: path.write_bytes(path.read_bytes()[:40]),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"\xff" * 100),
    ],
    ids=["one byte less", "header only", "empty", "not safetensors"],
)
def test_a_damaged_shard(folder: Path, damage: Callable[[Path], int]) -> None:
    shard = shard_of(folder, "model.norm.weight")
    damage(shard)
    with pytest.raises(CheckpointError) as caught:
        open_model(folder, LLAMA)
    assert caught.value.where == str(shard)
    assert "truncated or altered" in caught.value.do


def test_a_missing_shard(folder: Path) -> None:
    shard = shard_of(folder, "model.norm.weight")
    shard.unlink()
    with pytest.raises(CheckpointError, match=shard.name):
        open_model(folder, LLAMA)


def test_a_folder_without_weights(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=SINGLE):
        WeightSource(tmp_path)


def test_a_missing_tensor(tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / SINGLE)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / SINGLE)
    with pytest.raises(CheckpointError, match=re.escape("no tensor model.layers.1.mlp.up_proj.weight")):
        open_model(tmp_path, LLAMA)


def test_names_are_translated_to_those_of_the_modules(tmp_path: Path) -> None:
    model = tiny()
    model.save_pretrained(tmp_path)
    tensors = {f"old.{name}": value for name, value in load_file(tmp_path / SINGLE).items()}
    save_file(tensors, tmp_path / SINGLE)
    source = WeightSource(tmp_path, lambda stored: stored.removeprefix("old."))
    assert set(source.names()) == set(model.state_dict())
    assert torch.equal(source.read("model.norm.weight"), model.model.norm.weight)
    assert source.stored_name("model.norm.weight") == "old.model.norm.weight"
    assert source.stored_name("model.norm.scale") == "old.model.norm.scale"
    source.name_by(lambda stored: stored.removeprefix("old."), lambda stored: stored.replace("old.", "new."))
    assert source.published_name("model.norm.weight") == "new.model.norm.weight"
    assert source.published_name("model.norm.scale") == "new.model.norm.scale"


def test_a_language_model_without_its_head_has_other_names(tmp_path: Path) -> None:
    """As `from_pretrained` does, read the weights of the base model under the names of the whole one."""
    tiny(tie=True).model.save_pretrained(tmp_path)
    assert "norm.weight" in WeightSource.names_of(tmp_path / SINGLE)
    opened = open_model(tmp_path, LLAMA)
    assert "model.norm.weight" in opened.source
    assert opened.source.stored_name("model.layers.0.mlp.up_proj.weight_packed") == "layers.0.mlp.up_proj.weight_packed"
    packed = "model.layers.0.mlp.up_proj.weight_packed"
    assert opened.source.published_name(packed) == packed


def test_a_model_is_opened_without_weights(folder: Path) -> None:
    opened = open_model(folder, LLAMA)
    assert all(parameter.is_meta for parameter in opened.model.parameters())
    assert not any(buffer.is_meta for buffer in opened.model.buffers())
    assert not opened.model.training
    assert opened.block_name(1) == "model.layers.1"


def test_an_adapter_for_another_model(folder: Path) -> None:
    with pytest.raises(AdapterError, match=re.escape("model.layers")):
        open_model(folder, replace(LLAMA, blocks="model.decoder.layers"))


def test_materialising_casts_floats_only(tmp_path: Path) -> None:
    save_file({"m.weight": torch.randn(3, 2), "m.count": torch.tensor([5])}, tmp_path / SINGLE)
    with torch.device("meta"):
        module = nn.Linear(2, 3, bias=False)
        module.register_buffer("count", torch.zeros(1, dtype=torch.int64))
    WeightSource(tmp_path).materialise(module, "m.", torch.bfloat16, CPU)
    assert module.weight.dtype is torch.bfloat16
    assert isinstance(module.weight, nn.Parameter)
    assert not module.weight.requires_grad
    assert torch.equal(module.get_buffer("count"), torch.tensor([5]))


@pytest.mark.parametrize("tie", [False, True])
def test_the_front_is_read_and_the_head_is_not(tmp_path: Path, tie: bool) -> None:
    model = tiny(tie)
    model.save_pretrained(tmp_path)
    opened = open_model(tmp_path, LLAMA)
    assert ("lm_head.weight" in opened.source) is not tie

    def batches() -> Iterator[Inputs]:
        yield {"input_ids": TOKENS}
        named = opened.model.named_parameters()
        real = [name for name, parameter in named if parameter.untyped_storage().nbytes() >= parameter.nbytes]
        assert real == ["model.embed_tokens.weight"]
        yield {"input_ids": TOKENS + 1}

    samples = list(capture_front(opened, batches(), torch.float32))
    assert torch.equal(samples[0].hidden, model.model.embed_tokens(TOKENS))
    assert torch.equal(samples[1].hidden, model.model.embed_tokens(TOKENS + 1))
    assert all(parameter.is_meta for parameter in opened.model.parameters())
