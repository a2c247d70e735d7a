"""A model that a user has in memory is quantized, tuned and judged as the same model in a folder is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

import eqat_mm
from eqat_mm.api.in_memory import NOTE, written
from eqat_mm.checkpoint.manifest import read_manifest
from eqat_mm.errors import ConfigError, ResourceError
from eqat_mm.quant.spec import QuantSpec
from tests.api.conftest import FEW, HELD_OUT, STEPS, WINDOWS, Seeing, logits_of, quantized
from tests.checkpoint.files import assert_four_lines, contents, same_weights
from tests.tiny_model import Tiny, tiny_llama, word_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:.*these settings are", "ignore:`is_gradient_checkpointing`")


def loaded(tiny: Tiny, dtype: torch.dtype = torch.float32) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(tiny.folder, dtype=dtype)


def test_the_same_model_gives_the_same_checkpoint(tiny: Tiny, packed: Path, tmp_path: Path) -> None:
    model = quantized(tiny, tmp_path / "run", loaded(tiny))
    assert same_weights(tmp_path / "run" / "model", packed / "model")
    assert read_manifest(tmp_path / "run" / "model").source == str(tmp_path / "run" / "source")
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "run" / "model")("w5")["input_ids"] == [5]
    assert torch.equal(logits_of(model), logits_of(eqat_mm.load(packed)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_is_written_is_the_model_in_its_dtype(tiny: Tiny, tmp_path: Path, dtype: torch.dtype) -> None:
    model = loaded(tiny, dtype)
    folder = written(model, tmp_path / "source", None, overwrite=False)
    stored = load_file(folder / "model.safetensors")
    assert all(torch.equal(stored[name], tensor) for name, tensor in model.state_dict().items())
    assert {tensor.dtype for tensor in stored.values()} == {dtype}
    assert json.loads((folder / NOTE).read_text())["class"] == "LlamaForCausalLM"
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_it_goes_on_with_the_same_model_only(tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = loaded(tiny)
    quantized(tiny, tmp_path / "run", model)
    assert "the model in memory is written to" in capsys.readouterr().out
    quantized(tiny, tmp_path / "run", model)
    assert "already finished" in capsys.readouterr().out
    before = contents(tmp_path)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] += 1.0  # one number of all
    with pytest.raises(ConfigError, match="another model") as raised:
        quantized(tiny, tmp_path / "run", model)
    assert_four_lines(raised.value)
    assert contents(tmp_path) == before
    quantized(tiny, tmp_path / "run", model, overwrite=True)
    assert contents(tmp_path / "run" / "source") != {
        name.removeprefix("run/source/"): value for name, value in before.items() if name.startswith("run/source/")
    }
    quantized(tiny, tmp_path / "run", model)
    assert "already finished" in capsys.readouterr().out


@pytest.mark.parametrize("change", ["tensor", "config", "generation", "processor"])
def test_any_change_is_another_model(tiny: Tiny, tmp_path: Path, change: str) -> None:
    model, processor = loaded(tiny), word_tokenizer()
    written(model, tmp_path / "source", processor, overwrite=False)
    if change == "tensor":
        model.lm_head.weight.data[3, 3].neg_()
    elif change == "config":
        model.config.rms_norm_eps = 1e-3
    elif change == "generation":
        model.generation_config.max_new_tokens = 3
    else:
        processor = word_tokenizer({9: "<nine>"})
    with pytest.raises(ConfigError, match="another model"):
        written(model, tmp_path / "source", processor, overwrite=False)


def test_tuned_and_judged_by_what_was_written(tiny: Tiny, tmp_path: Path) -> None:
    model = loaded(tiny)
    model.lm_head.weight.data.mul_(1.5)  # tuned by its user
    small = eqat_mm.quantize(
        model, bits=4, group_size=32, text=tiny.text, output=tmp_path / "block-ap", settings=FEW, quiet=True
    )
    found = eqat_mm.evaluate(small, text=tiny.text, settings=HELD_OUT)
    other = eqat_mm.evaluate(small, text=tiny.text, reference=tiny.folder, settings=HELD_OUT)
    assert found.kl is not None
    assert other.kl is not None
    assert found.kl < other.kl
    full = eqat_mm.evaluate(model, text=tiny.text, settings=HELD_OUT, reference=tmp_path / "block-ap" / "source")
    assert (full.kl, full.bits_per_weight) == (pytest.approx(0, abs=1e-6), None)
    tuned = eqat_mm.tune(small, text=tiny.text, loss="kl", settings=STEPS | WINDOWS, quiet=True)
    assert tuned.checkpoint_origin.folder == tmp_path / "e2e-qp" / "model"  # type: ignore[union-attr]


def test_a_llava_with_its_processor_found(seeing: Seeing, tmp_path: Path) -> None:
    model = transformers.AutoModelForImageTextToText.from_pretrained(seeing.folder, dtype=torch.bfloat16)
    settings = {"bits": 4, "group_size": 32, "text": seeing.text, "settings": FEW, "quiet": True}
    eqat_mm.quantize(model, output=tmp_path / "run", **settings)
    processor = transformers.AutoProcessor.from_pretrained(tmp_path / "run" / "model")
    assert processor.image_token == "<image>"
    assert load_file(tmp_path / "run" / "source" / "model.safetensors").keys()
    named = eqat_mm.quantize(seeing.folder, output=tmp_path / "named", **{**settings, "bits": 3})
    assert named.checkpoint_origin.manifest.spec["bits"] == 3  # type: ignore[union-attr]


def test_a_default_folder_has_the_name_of_the_model(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    quantized(tiny, None, loaded(tiny), quiet=True)  # type: ignore[arg-type]
    assert Path("runs/tiny-llama-w2g32/block-ap/source/config.json").is_file()
    made = tiny_llama()
    quantized(tiny, None, made, processor=word_tokenizer(), quiet=True)  # type: ignore[arg-type]
    assert Path("runs/llama-w2g32/block-ap/model/eqat.json").is_file()


def bad_model(kind: str, tiny: Tiny, packed: Path) -> Any:
    model = loaded(tiny)
    if kind == "packed":
        return eqat_mm.load(packed)
    if kind == "read from a packed folder":
        return transformers.AutoModelForCausalLM.from_pretrained(packed / "model")
    if kind == "under peft":
        return peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    if kind == "with adapters":
        peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
        return model
    if kind == "on the meta device":
        return model.to("meta")
    return torch.nn.Linear(2, 2) if kind == "a module" else tiny_llama()


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("packed", "quantized already"),
        ("read from a packed folder", "quantized already"),
        ("under peft", "merge_and_unload"),
        ("with adapters", "merge_and_unload"),
        ("on the meta device", "meta device"),
        ("a module", "a transformers model"),
        ("without a tokenizer", "processor=AutoProcessor"),
    ],
)
def test_what_cannot_be_quantized_is_refused_before_anything_is_written(
    tiny: Tiny, packed: Path, tmp_path: Path, kind: str, words: str
) -> None:
    with pytest.raises(ConfigError) as raised:
        quantized(tiny, tmp_path / "run", bad_model(kind, tiny, packed))
    assert_four_lines(raised.value)
    assert words in str(raised.value)
    assert not any(tmp_path.rglob("*"))


def test_bad_settings_are_told_before_the_model_is_written(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for wrong in ({"text": None}, {"bits": 5}, {"fit.epochz": 1}):
        with pytest.raises(ConfigError):
            quantized(tiny, tmp_path / "run", loaded(tiny), **wrong)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="save it first"):
        quantized(tiny, tmp_path / "run", loaded(tiny))
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.setattr("eqat_mm.api.in_memory.require_disk", full)
    with pytest.raises(ResourceError):
        quantized(tiny, tmp_path / "run", loaded(tiny))
    assert not any(tmp_path.rglob("*"))


def full(*_: Any) -> None:
    raise ResourceError("disk", "0", "more", "free some")


def test_a_spec_comes_from_the_settings(tiny: Tiny, tmp_path: Path) -> None:
    model = quantized(tiny, tmp_path / "run", loaded(tiny), settings={**FEW, "quant.symmetric": True}, quiet=True)
    assert QuantSpec(**model.checkpoint_origin.manifest.spec) == QuantSpec(2, 32, True)  # type: ignore[union-attr]
