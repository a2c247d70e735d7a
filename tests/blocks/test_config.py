"""Files that describe a model: whatever is wrong with them is said in four lines."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from eqat_mm.blocks.config import GENERATION_CONFIG, MOST_LAYERS, read_config, read_generation_config
from eqat_mm.blocks.source import check_folder, open_model
from eqat_mm.checkpoint.folders import load_for_inference, takes_images
from eqat_mm.errors import CheckpointError
from eqat_mm.runtime.files import read_json, write_json
from llava_adapters import arch_of_folder
from tests.checkpoint.files import assert_four_lines
from tests.tiny_model import tiny_llama

CPU = torch.device("cpu")
BROKEN = {
    "empty": b"",
    "cut off": b'{"model_type": "llama", "hid',
    "a list": b"[]",
    "a word": b'"x"',
    "null": b"null",
    "UTF-16": '{"model_type": "llama"}'.encode("utf-16"),
    "Latin-1": '{"model_type": "llama", "x": "é"}'.encode("latin-1"),
    "deep": b"[" * 100_000,
    "deep objects": b'{"a":' * 100_000,
    "a long number": b'{"vocab_size": ' + b"9" * 5000 + b"}",
}
by_kind = pytest.mark.parametrize("content", BROKEN.values(), ids=list(BROKEN))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_llama().save_pretrained(tmp_path)
    return tmp_path


def refusal(folder: Path, file: str) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        open_model(folder, arch_of_folder(folder, "llama"))
    assert_four_lines(caught.value)
    assert file in caught.value.where
    with pytest.raises(CheckpointError):
        load_for_inference(folder, CPU)
    return caught.value


@by_kind
def test_a_broken_configuration(folder: Path, content: bytes) -> None:
    (folder / "config.json").write_bytes(content)
    refusal(folder, "config.json")
    with pytest.raises(CheckpointError):
        takes_images(folder)


@by_kind
def test_broken_settings_of_generation(folder: Path, content: bytes) -> None:
    if content.startswith(b'{"vocab_size"'):
        content = content.replace(b"vocab_size", b"max_length")
    (folder / GENERATION_CONFIG).write_bytes(content)
    refusal(folder, GENERATION_CONFIG)


@pytest.mark.parametrize("setting", [{"num_return_sequences": 2}, {"cache_implementation": "nope"}], ids=str)
def test_contradictory_settings_of_generation(folder: Path, setting: dict[str, Any]) -> None:
    write_json(folder / GENERATION_CONFIG, setting)
    refusal(folder, GENERATION_CONFIG)


def test_settings_of_generation_that_are_not_there(folder: Path) -> None:
    (folder / GENERATION_CONFIG).unlink()
    assert read_generation_config(folder) is None
    open_model(folder, arch_of_folder(folder))


@pytest.mark.parametrize(
    "change",
    [
        {"num_attention_heads": 0},
        {"num_attention_heads": "two"},
        {"num_hidden_layers": "2"},
        {"num_hidden_layers": None},
        {"num_hidden_layers": -1},
        {"num_hidden_layers": 0},
        {"hidden_size": 1.5},
        {"hidden_size": -64},
        {"hidden_size": 10**15},
        {"head_dim": 10**11},
        {"vocab_size": []},
        {"vocab_size": 0},
        {"dtype": "float7"},
        {"dtype": "int8"},
        {"hidden_act": "nope"},
        {"hidden_act": None},
        {"rope_parameters": {"rope_type": "nope", "rope_theta": 10000.0}},
        {"rope_parameters": {"rope_type": "yarn"}},
        {"rope_scaling": 3},
        {"attn_implementation": "nope"},
        {"eos_token_id": "</s>"},
        {"quantization_config": "int8"},
        {"quantization_config": 3},
        {"model_type": "nope"},
        {"model_type": None},
        {"model_type": ["llama"]},
        {"model_type": "clip_vision_model"},
    ],
    ids=str,
)
def test_a_contradictory_configuration(folder: Path, change: dict[str, Any]) -> None:
    write_json(folder / "config.json", read_json(folder / "config.json") | change)
    refusal(folder, "")


@pytest.mark.parametrize("number", ["NaN", "Infinity", "1e999"])
def test_a_number_that_a_checkpoint_could_not_hold(folder: Path, number: str) -> None:
    text = (folder / "config.json").read_text(encoding="utf-8")
    (folder / "config.json").write_text(text.replace("{", f'{{"unused": {number},', 1), encoding="utf-8")
    with pytest.raises(CheckpointError, match="no usable configuration") as caught:
        open_model(folder, arch_of_folder(folder))
    assert_four_lines(caught.value)


@pytest.mark.parametrize("count", [10**6, 10**9, 10**30, 3e9])
def test_a_number_of_layers_that_no_model_has(folder: Path, count: float) -> None:
    write_json(folder / "config.json", read_json(folder / "config.json") | {"num_hidden_layers": count})
    assert "num_hidden_layers" in refusal(folder, "config.json").given


def test_a_number_of_layers_is_bounded_by_what_is_stored(folder: Path) -> None:
    write_json(folder / "config.json", read_json(folder / "config.json") | {"num_hidden_layers": MOST_LAYERS})
    assert read_config(folder).num_hidden_layers == MOST_LAYERS
    assert "stored tensors" in refusal(folder, "config.json").allowed


def test_other_numbers_are_not_bounded_by_what_is_stored(folder: Path) -> None:
    more = {"max_window_layers": 28, "num_local_experts": 64}
    write_json(folder / "config.json", read_json(folder / "config.json") | more)
    open_model(folder, arch_of_folder(folder))


@pytest.mark.parametrize("target", ["/etc/hosts", "../elsewhere.json", "/dev/full", "nowhere.json"])
@pytest.mark.parametrize("name", ["vocab.json", "extra.txt", "config.json"])
def test_a_link_that_leads_elsewhere(folder: Path, name: str, target: str) -> None:
    """Its content would go into a checkpoint, which people publish."""
    (folder.parent / "elsewhere.json").write_text("{}", encoding="utf-8")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(target)
    with pytest.raises(CheckpointError) as caught:
        check_folder(folder, "AutoModelForCausalLM")
    assert_four_lines(caught.value)
    assert caught.value.where == str(folder / name)


def test_a_pipe(folder: Path) -> None:
    os.mkfifo(folder / "vocab.json")
    assert refusal(folder, "vocab.json").given == "no regular file"


def test_links_of_a_cache_and_of_the_folder(tmp_path: Path) -> None:
    """A download of the hub lies in a folder of links."""
    cache = tmp_path / "models--a--b"
    tiny_llama().save_pretrained(cache / "blobs")
    folder = cache / "snapshots" / "main"
    folder.mkdir(parents=True)
    for path in (cache / "blobs").iterdir():
        (folder / path.name).symlink_to(f"../../blobs/{path.name}")
    (folder / "again.json").symlink_to("config.json")
    open_model(folder, arch_of_folder(folder))


@pytest.mark.parametrize("names", [None, [], ["MyCustomLlamaForCausalLM"], ["LlamaModel"], [True], "absent"], ids=str)
def test_architectures_decide_nothing(folder: Path, names: Any) -> None:
    """The adapter knows the class; a source is read whatever the entry says."""
    config = read_json(folder / "config.json") | {"architectures": names}
    if names == "absent":
        del config["architectures"]
    write_json(folder / "config.json", config)
    opened = open_model(folder, arch_of_folder(folder))
    assert type(opened.model).__name__ == "LlamaForCausalLM"
    assert type(load_for_inference(folder, CPU)).__name__ == "LlamaForCausalLM"
