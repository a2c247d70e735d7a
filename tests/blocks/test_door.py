"""What is stored is compared with the model before anything else is done with a folder."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from eqat_mm.blocks.source import INDEX, SINGLE, check_folder, open_model
from eqat_mm.blocks.stored import weight_files
from eqat_mm.checkpoint.folders import load_for_inference
from eqat_mm.errors import CheckpointError
from eqat_mm.runtime.files import read_json, write_json
from llava_adapters import arch_for
from tests.checkpoint.files import assert_four_lines
from tests.tiny_llava import save_tiny_llava
from tests.tiny_model import tiny_llama

CPU = torch.device("cpu")
LLAMA = arch_for("llama")
UP = "model.layers.1.mlp.up_proj"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
Tensors = dict[str, Tensor]


def save(folder: Path, **config: Any) -> Path:
    """Save a random two-block Llama in one file."""
    tiny_llama(**config).save_pretrained(folder)
    return folder


def alter(folder: Path, change: Callable[[Tensors], object]) -> None:
    tensors = load_file(folder / SINGLE)
    change(tensors)
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})


def describe(folder: Path, **changes: Any) -> None:
    write_json(folder / "config.json", read_json(folder / "config.json") | changes)


def refusal(folder: Path) -> str:
    """Open a model in every way; all must refuse alike, and the message is returned."""
    said = []
    for open_it in (lambda: open_model(folder, LLAMA), lambda: load_for_inference(folder, CPU)):
        with pytest.raises(CheckpointError) as caught:
            open_it()
        assert_four_lines(caught.value)
        said.append(str(caught.value))
    assert said[0] == said[1]
    return said[0]


@pytest.mark.parametrize("name", [HEAD, EMBEDDING, "model.norm.weight", f"{UP}.weight"])
def test_a_missing_tensor_is_named(tmp_path: Path, name: str) -> None:
    save(tmp_path)
    alter(tmp_path, lambda tensors: tensors.pop(name))
    assert f"no tensor {name}\n" in refusal(tmp_path)


def test_of_many_missing_tensors_the_first_are_named(tmp_path: Path) -> None:
    save(tmp_path, num_hidden_layers=1)
    describe(tmp_path, num_hidden_layers=2)
    said = refusal(tmp_path)
    assert "model.layers.1.self_attn.q_proj.weight" in said
    assert "and 6 more" in said


@pytest.mark.parametrize("stored", [HEAD, EMBEDDING, "both"])
def test_of_a_tied_pair_one_is_enough(tmp_path: Path, stored: str) -> None:
    save(tmp_path, tie_word_embeddings=True)
    value = load_file(tmp_path / SINGLE)[EMBEDDING]
    names = {HEAD, EMBEDDING} if stored == "both" else {stored}
    alter(tmp_path, lambda tensors: (tensors.pop(EMBEDDING), tensors.update({name: value.clone() for name in names})))
    source = open_model(tmp_path, LLAMA).source
    assert {name for name in (HEAD, EMBEDDING) if name in source} == names
    assert torch.equal(source.read(EMBEDDING), value)
    assert torch.equal(source.read(HEAD), value)
    loaded = load_for_inference(tmp_path, CPU)
    assert torch.equal(loaded.get_output_embeddings().weight, value)
    assert torch.equal(loaded.get_input_embeddings().weight, value)


def test_a_tied_pair_without_either(tmp_path: Path) -> None:
    save(tmp_path, tie_word_embeddings=True)
    alter(tmp_path, lambda tensors: tensors.pop(EMBEDDING))
    assert f"no tensor {EMBEDDING}" in refusal(tmp_path)


def test_a_tied_pair_of_two_matrices(tmp_path: Path) -> None:
    save(tmp_path)
    describe(tmp_path, tie_word_embeddings=True)
    assert "two different tensors are stored" in refusal(tmp_path)


def test_names_of_the_base_class(tmp_path: Path) -> None:
    tiny_llama(tie_word_embeddings=True).model.save_pretrained(tmp_path)
    assert EMBEDDING in open_model(tmp_path, LLAMA).source
    assert load_for_inference(tmp_path, CPU).dtype is torch.float32


@pytest.mark.parametrize("config", [{"vocab_size": 104}, {"intermediate_size": 64}, {"hidden_size": 128}], ids=str)
def test_another_shape_than_the_configuration_says(tmp_path: Path, config: dict[str, int]) -> None:
    save(tmp_path)
    describe(tmp_path, **config)
    assert "shape [" in refusal(tmp_path)


def test_a_transposed_linear(tmp_path: Path) -> None:
    save(tmp_path)
    alter(tmp_path, lambda tensors: tensors.update({f"{UP}.weight": tensors[f"{UP}.weight"].T.contiguous()}))
    said = refusal(tmp_path)
    assert f"{SINGLE}: {UP}.weight" in said
    assert "given:   shape [64, 128]" in said
    assert "allowed: [128, 64]" in said


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dtypes_of_16_bits(tmp_path: Path, dtype: torch.dtype) -> None:
    save(tmp_path)
    alter(tmp_path, lambda tensors: tensors.update({name: value.to(dtype) for name, value in tensors.items()}))
    assert open_model(tmp_path, LLAMA).source.read(HEAD).dtype is dtype


def test_double_precision(tmp_path: Path) -> None:
    save(tmp_path)
    alter(tmp_path, lambda tensors: tensors.update({HEAD: tensors[HEAD].double()}))
    said = refusal(tmp_path)
    assert "F64" in said
    assert "F16, BF16, F32" in said


def test_a_tensor_in_two_shards(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path, max_shard_size="100KB")
    first = weight_files(tmp_path)[0]
    save_file(load_file(first), tmp_path / "more.safetensors")
    index = read_json(tmp_path / INDEX)
    index["weight_map"]["another"] = "more.safetensors"
    write_json(tmp_path / INDEX, index)
    said = refusal(tmp_path)
    assert "more.safetensors" in said
    assert "twice" in said


def test_a_tensor_under_two_names(tmp_path: Path) -> None:
    save(tmp_path)
    alter(tmp_path, lambda tensors: tensors.update({"norm.weight": torch.ones(64)}))
    assert "the tensor model.norm.weight twice" in refusal(tmp_path)


@pytest.mark.parametrize("counted", [1, 0])
def test_more_layers_than_the_configuration_counts(tmp_path: Path, counted: int) -> None:
    """Half a model predicts, and nothing says that it is half."""
    save(tmp_path)
    describe(tmp_path, num_hidden_layers=counted)
    said = refusal(tmp_path)
    assert f"model.layers.{counted}." in said
    assert "num_hidden_layers" in said


def test_a_vision_tower_with_further_layers(tmp_path: Path) -> None:
    save_tiny_llava(tmp_path)
    config = read_json(tmp_path / "config.json")
    config["vision_config"]["num_hidden_layers"] -= 1
    write_json(tmp_path / "config.json", config)
    with pytest.raises(CheckpointError, match="beyond"):
        open_model(tmp_path, arch_for("llava"))


def test_what_has_no_place_is_said_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path)
    extra = {f"extra.{index}.weight": torch.zeros(2) for index in range(5)}
    alter(tmp_path, lambda tensors: tensors.update(extra))
    open_model(tmp_path, LLAMA)
    said = capsys.readouterr().out
    assert "5 stored tensors" in said
    assert "extra.0.weight, " in said
    assert said.count("\n") == 1


def test_what_transformers_passes_over_is_not_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path)
    alter(tmp_path, lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}))
    open_model(tmp_path, LLAMA)
    assert capsys.readouterr().out == ""


def test_a_single_file_outweighs_an_index(tmp_path: Path) -> None:
    """As in transformers; otherwise a model would be compared with another one."""
    model = tiny_llama(seed=1)
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    save(tmp_path / "right").joinpath(SINGLE).rename(tmp_path / SINGLE)
    assert weight_files(tmp_path) == [tmp_path / SINGLE]
    loaded = load_for_inference(tmp_path, CPU)
    assert torch.equal(open_model(tmp_path, LLAMA).source.read(HEAD), loaded.get_parameter(HEAD))
    assert not torch.equal(loaded.get_parameter(HEAD), model.lm_head.weight)


@pytest.mark.parametrize(
    "index",
    [
        "",
        "[]",
        "{}",
        '{"metadata": {}, "weight_map": {}}',
        '{"metadata": {}, "weight_map": [1]}',
        '{"weight_map": {"a": "b.safetensors"}}',
        '{"metadata": {}, "weight_map": {"a": 1}}',
        '{"metadata": {}, "weight_map": {"a": "../b.safetensors"}}',
        '{"metadata": {}, "weight_map": {"a": "/b.safetensors"}}',
        '{"metadata": {}, "weight_map": {"a": "a\\u0000b"}}',
        '{"metadata": {}, "weight_map": {"a": "' + "b" * 300 + '"}}',
        "[" * 100_000,
    ],
    ids=lambda text: text[:40],
)
def test_an_index_that_is_none(tmp_path: Path, index: str) -> None:
    tiny_llama().save_pretrained(tmp_path, max_shard_size="100KB")
    (tmp_path / INDEX).write_text(index, encoding="utf-8")
    assert str(tmp_path) in refusal(tmp_path)


@pytest.mark.parametrize("name", ["adapter_config.json", "shard-00000-model-00001-of-00002.safetensors"])
def test_files_that_transformers_would_add_or_prefer(tmp_path: Path, name: str) -> None:
    save(tmp_path)
    (tmp_path / name).write_text("{}", encoding="utf-8")
    assert name in refusal(tmp_path)


def test_a_configuration_that_names_other_weights(tmp_path: Path) -> None:
    save(tmp_path)
    describe(tmp_path, transformers_weights="other.safetensors")
    assert "transformers_weights" in refusal(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", [HEAD, EMBEDDING, "model.norm.weight", f"{UP}.weight"])
def test_values_that_are_not_finite(tmp_path: Path, name: str, value: float) -> None:
    save(tmp_path)
    alter(tmp_path, lambda tensors: tensors[name].view(-1)[:2].fill_(value))
    source = open_model(tmp_path, LLAMA).source
    with pytest.raises(CheckpointError) as caught:
        source.read(name)
    assert_four_lines(caught.value)
    assert caught.value.where == f"{tmp_path / SINGLE}: {name}"
    assert caught.value.given.startswith("2 of ")
    with pytest.raises(CheckpointError, match=re.escape(caught.value.given)):
        load_for_inference(tmp_path, CPU)


def test_values_beyond_the_dtype_they_are_read_to(tmp_path: Path) -> None:
    save(tmp_path)
    alter(tmp_path, lambda tensors: tensors[HEAD].view(-1)[:1].fill_(1e6))
    with pytest.raises(CheckpointError, match="float16") as caught:
        load_for_inference(tmp_path, CPU, torch.float16)
    assert_four_lines(caught.value)
    load_for_inference(tmp_path, CPU, torch.bfloat16)


def test_a_model_whose_tensors_are_merged_while_reading(tmp_path: Path) -> None:
    """Experts are stored one by one and are one tensor in the model; transformers reads them, so none is missing."""
    import transformers

    config = transformers.MixtralConfig(
        vocab_size=97, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=2,
    )  # fmt: skip
    transformers.MixtralForCausalLM(config).save_pretrained(tmp_path)
    assert any("experts.0." in name for name in load_file(tmp_path / SINGLE))
    assert check_folder(tmp_path, "AutoModelForCausalLM").left_over == []
    assert isinstance(load_for_inference(tmp_path, CPU), transformers.MixtralForCausalLM)


def test_headers_alone_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each shard is opened once, whatever it holds."""
    import eqat_mm.blocks.stored as stored

    tiny_llama().save_pretrained(tmp_path, max_shard_size="100KB")
    opened: list[str] = []
    real = stored.safe_open

    def counting(path: str, **options: Any) -> Any:
        opened.append(Path(path).name)
        return real(path, **options)

    monkeypatch.setattr(stored, "safe_open", counting)
    open_model(tmp_path, LLAMA)
    shards = set(json.loads((tmp_path / INDEX).read_text(encoding="utf-8"))["weight_map"].values())
    assert sorted(opened) == sorted(shards)
