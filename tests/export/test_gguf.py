"""An exported GGUF file, read by the package `gguf`: keys, names, values, vocabulary; models it does not hold."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from torch import Tensor

from eqat_mm.errors import ConfigError, ExportError
from eqat_mm.export.form import Choices
from eqat_mm.export.gguf import form
from eqat_mm.export.gguf.form import FORM
from eqat_mm.export.gguf.names import gguf_name, row_order
from eqat_mm.export.gguf.settings import rope_factors, size_keys
from eqat_mm.export.gguf.tokens import token_keys
from eqat_mm.export.opened import PackedModel, open_packed
from eqat_mm.quant.spec import QuantSpec
from tests.export.made import packed, packed_llava, sentencepiece_tokenizer

SPEC = QuantSpec(4, 32, symmetric=True)
HEAD = 16
ROPE = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> PackedModel:
    return open_packed(packed(tmp_path_factory.mktemp("llama"), SPEC, attention_bias=True, rms_norm_eps=1e-5))


@pytest.fixture(scope="session")
def llava(tmp_path_factory: pytest.TempPathFactory) -> PackedModel:
    return open_packed(packed_llava(tmp_path_factory.mktemp("llava"), SPEC))


def written(model: PackedModel, folder: Path, **choices: Any) -> list[gguf.GGUFReader]:
    FORM.refuse(model, Choices(**choices))
    FORM.write(model, folder, Choices(**choices))
    return [gguf.GGUFReader(path) for path in sorted(folder.glob("*.gguf"))]


def values(reader: gguf.GGUFReader) -> dict[str, Tensor]:
    found = {}
    for one in reader.tensors:
        value = gguf.quants.dequantize(one.data, one.tensor_type)
        found[one.name] = torch.from_numpy(value.copy()).reshape([int(size) for size in reversed(one.shape)])
    return found


def test_every_tensor_of_a_language_model(llama: PackedModel, tmp_path: Path) -> None:
    (reader,) = written(llama, tmp_path, embedding="f16")
    found = values(reader)
    expected = {f"{name}.weight": weight.dense() for name, weight in llama.weights.items()}
    expected |= {name: llama.source.read(name).float() for name in llama.others}
    assert found.keys() == {gguf_name(name) for name in expected}
    for name, value in expected.items():
        order = row_order(name, len(value), HEAD)
        assert torch.equal(found[str(gguf_name(name))], value if order is None else value[order]), name


def test_keys(llama: PackedModel, tmp_path: Path) -> None:
    (reader,) = written(llama, tmp_path)
    keys = {name: field.contents() for name, field in reader.fields.items()}
    assert keys["general.architecture"] == "llama"
    assert keys["general.file_type"] == gguf.LlamaFileType.MOSTLY_Q4_0
    assert keys["llama.block_count"] == 2
    assert keys["llama.attention.head_count_kv"] == 2
    assert keys["llama.rope.freq_base"] == 10000.0
    assert keys["llama.rope.dimension_count"] == HEAD
    assert keys["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-5)
    assert keys["tokenizer.ggml.pre"] == "smollm"
    assert keys["tokenizer.ggml.tokens"][:5] == ["<unk>", "<s>", "</s>", "Ġ", "a"]
    assert keys["tokenizer.ggml.token_type"][:4] == [3, 3, 3, 1]
    assert keys["tokenizer.ggml.token_type"][-1] == 5  # a row of the embedding that no token has
    assert len(keys["tokenizer.ggml.tokens"]) == 97
    assert keys["tokenizer.ggml.eos_token_id"] == 2
    assert keys["tokenizer.chat_template"] == "{{ messages[0].content }}"


def test_embeddings_are_rounded_to_eight_bits_by_default(llama: PackedModel, tmp_path: Path) -> None:
    (reader,) = written(llama, tmp_path)
    kinds = {one.name: one.tensor_type for one in reader.tensors}
    assert kinds["token_embd.weight"] == kinds["output.weight"] == gguf.GGMLQuantizationType.Q8_0
    stored = llama.source.read("model.embed_tokens.weight").float()
    step = stored.abs().amax() / 127
    assert (values(reader)["token_embd.weight"] - stored).abs().max() <= step * 0.51


def test_sizes_are_said_before(llama: PackedModel, tmp_path: Path) -> None:
    written(llama, tmp_path)
    size = next(tmp_path.glob("*.gguf")).stat().st_size
    assert size <= FORM.size(llama, Choices()) < 1.5 * size


def test_tied_embeddings_are_stored_once_and_other_rotations_keep_their_rows(tmp_path: Path) -> None:
    model = open_packed(packed(tmp_path, SPEC, "qwen3", tie_word_embeddings=True, head_dim=32))
    (tmp_path / "gguf").mkdir()
    (reader,) = written(model, tmp_path / "gguf")
    found = values(reader)
    assert "output.weight" not in found
    assert "blk.1.attn_q_norm.weight" in found
    weight = model.weights["model.layers.0.self_attn.q_proj"]
    assert torch.equal(found["blk.0.attn_q.weight"], weight.dense())
    assert reader.fields["qwen3.attention.key_length"].contents() == 32


def test_frequencies_of_llama_3(tmp_path: Path) -> None:
    model = open_packed(packed(tmp_path, SPEC, rope_parameters=ROPE | {"original_max_position_embeddings": 64}))
    factors = rope_factors(model.text_config)
    assert factors is not None
    assert factors.shape == (HEAD // 2,)
    assert factors[0] == 1.0  # the fastest is kept
    assert factors[-1] == pytest.approx(8.0)  # the slowest is divided by the whole factor
    assert "rope_freqs.weight" in values(written(model, tmp_path)[0])


def test_linear_and_yarn_scaling(llama: PackedModel) -> None:
    config = copy.deepcopy(llama.text_config)
    config.rope_parameters = {
        "rope_type": "yarn",
        "rope_theta": 5e5,
        "factor": 4,
        "original_max_position_embeddings": 8,
    }
    keys = size_keys(config, form.family_of(llama))
    assert keys["llama.rope.scaling.type"] == "yarn"
    assert keys["llama.rope.scaling.factor"] == 4.0
    assert keys["llama.rope.scaling.original_context_length"] == 8
    assert keys["llama.rope.freq_base"] == 5e5


def test_sentencepiece(llama: PackedModel, tmp_path: Path) -> None:
    sentencepiece_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_bytes((llama.folder / "config.json").read_bytes())
    vocabulary = token_keys(_in(llama, tmp_path), 97)
    words = vocabulary["tokenizer.ggml.tokens"]
    kinds, scores = vocabulary["tokenizer.ggml.token_type"], vocabulary["tokenizer.ggml.scores"]
    assert vocabulary["tokenizer.ggml.model"] == "llama"
    assert vocabulary["tokenizer.ggml.add_space_prefix"] is True
    assert kinds[0] == 2
    assert kinds[words.index("<0x0A>")] == 6
    order = [scores[words.index(word)] for word in ("an", "and", "▁and", "q")]
    assert order == sorted(order, reverse=True)
    assert len(set(order)) == 4


def _in(model: PackedModel, folder: Path) -> PackedModel:
    """The model as if it lay in another folder."""
    fields = {name: getattr(model, name) for name in ("manifest", "config", "spec", "source", "weights", "others")}
    return PackedModel(folder, **fields)


def test_a_vision_tower_and_its_projector(llava: PackedModel, tmp_path: Path) -> None:
    language, vision = written(llava, tmp_path)
    assert "blk.1.ffn_down.weight" in values(language)
    assert not any(name.startswith(("v.", "mm.")) for name in values(language))
    keys, found = {name: field.contents() for name, field in vision.fields.items()}, values(vision)
    assert keys["general.architecture"] == "clip"
    assert keys["clip.vision.block_count"] == 2  # of three: the features are those before the last one
    assert keys["clip.vision.feature_layer"] == [2]
    assert keys["clip.vision.image_mean"] == pytest.approx([0.48145466, 0.4578275, 0.40821073])
    assert not any(name.startswith(("v.blk.2.", "v.post_ln")) for name in found)
    names = {
        "v.patch_embd.weight": "vision_tower.embeddings.patch_embedding.weight",
        "v.blk.0.ffn_up.weight": "vision_tower.encoder.layers.0.mlp.fc1.weight",
        "v.blk.1.attn_out.bias": "vision_tower.encoder.layers.1.self_attn.out_proj.bias",
        "mm.0.weight": "multi_modal_projector.linear_1.weight",
        "mm.2.bias": "multi_modal_projector.linear_2.bias",
    }
    for own, name in names.items():
        assert torch.equal(found[own], llava.source.read(f"model.{name}").float()), own
    per_layer = sum("encoder.layers.0." in name for name in llava.others)
    whole = sum("vision_tower" in name and "layers." not in name and "post_" not in name for name in llava.others)
    assert len(found) == 2 * per_layer + whole + 4


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("olmo2", {}, "olmo2"),
    ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "dynamic"),
]


@pytest.mark.parametrize(("kind", "changes", "words"), REFUSED)
def test_a_language_model_that_llama_cpp_has_not(kind: str, changes: Any, words: str, tmp_path: Path) -> None:
    model = open_packed(packed(tmp_path, SPEC, kind, **changes))
    with pytest.raises(ExportError, match=words):
        FORM.refuse(model, Choices())


def test_eight_asymmetric_bits(tmp_path: Path) -> None:
    model = open_packed(packed(tmp_path, QuantSpec(8, 32)))
    with pytest.raises(ExportError, match=r"_proj[\s\S]*w8g32[\s\S]*symmetric"):
        FORM.refuse(model, Choices())


@pytest.mark.parametrize(
    ("name", "value"),
    [("vision_feature_layer", [-2, -3]), ("projector_hidden_act", "relu"), ("model_type", "llava_next")],
)
def test_a_tower_that_llama_cpp_has_not(llava: PackedModel, name: str, value: Any) -> None:
    before = llava.config.get(name)
    llava.config[name] = value
    try:
        with pytest.raises(ExportError, match=name):
            FORM.refuse(llava, Choices())
    finally:
        llava.config[name] = before


def test_a_tokenizer_that_llama_cpp_has_not(llama: PackedModel, tmp_path: Path) -> None:
    for path in llama.folder.glob("*.json"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    content = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    content["pre_tokenizer"] = {"type": "Whitespace"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    (tmp_path / "eqat.json").unlink()
    with pytest.raises(ExportError, match="split by Whitespace"):
        token_keys(_in(llama, tmp_path), 97)


def test_without_the_package(llama: PackedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(form, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"eqat-mm\[export\]"):
        FORM.refuse(llama, Choices())


def test_special_tokens_without_a_row_are_left_out(llama: PackedModel) -> None:
    keys = token_keys(llama, 2)
    assert len(keys["tokenizer.ggml.tokens"]) == 2
    assert "tokenizer.ggml.eos_token_id" not in keys
    assert keys["tokenizer.ggml.bos_token_id"] == 1
