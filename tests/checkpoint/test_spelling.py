"""config.json, in the words of older readers, too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from eqat_mm.checkpoint.spelling import spelled_for_all, without_stale

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LONG = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
ROPES: dict[str, tuple[str, dict[str, Any], dict[str, Any] | None]] = {
    "default": ("llama", {"rope_type": "default"}, None),
    "linear": ("llama", {"rope_type": "linear", "factor": 2.0}, {"rope_type": "linear", "factor": 2.0}),
    "llama3": (
        "llama",
        LLAMA3 | {"original_max_position_embeddings": 64},
        LLAMA3 | {"original_max_position_embeddings": 64},
    ),
    "yarn": ("llama", YARN, YARN),
    "longrope": ("phi3", {"rope_type": "longrope"} | LONG, {"type": "longrope"} | LONG),
}
"""Kind -> model type, parameters as transformers 5 has them, and `rope_scaling` as transformers 4 expects it."""


@pytest.mark.parametrize(("kind", "parameters", "scaling"), ROPES.values(), ids=ROPES)
def test_rotary_embeddings_are_there_for_both_generations(
    kind: str, parameters: dict[str, Any], scaling: dict[str, Any] | None, tmp_path: Path
) -> None:
    config = transformers.CONFIG_MAPPING[kind](
        hidden_size=64,
        num_attention_heads=4,
        vocab_size=97,
        max_position_embeddings=256,
        rope_parameters={"rope_theta": 5e5, **parameters},
        dtype="bfloat16",
        eos_token_id=1,
        pad_token_id=0,
    )
    before = config.to_dict()
    after = spelled_for_all(before)
    assert after["rope_theta"] == 5e5
    assert after.get("rope_scaling") == scaling
    assert after["torch_dtype"] == "bfloat16"
    assert before.items() <= after.items()
    (tmp_path / "config.json").write_text(json.dumps(after))
    again = transformers.AutoConfig.from_pretrained(tmp_path).to_dict()
    kept = before["rope_parameters"]
    assert {name: again["rope_parameters"][name] for name in kept} == kept


def test_what_a_source_says_in_older_words_stays() -> None:
    published = {"rope_theta": 1e6, "rope_scaling": {"type": "su"}, "torch_dtype": "float16"}
    assert spelled_for_all(published) == published
    both = published | {"rope_parameters": {"rope_theta": 7.0, "rope_type": "default"}, "dtype": "bfloat16"}
    assert spelled_for_all(both) == both


def test_parts_of_a_model_are_spelled_out_too() -> None:
    text = {"rope_parameters": {"rope_theta": 1e5, "rope_type": "default"}, "dtype": "float32"}
    spelled = spelled_for_all({"text_config": text, "vision_config": {"dtype": "float32"}, "eos_token_id": 2})
    assert spelled["text_config"] == text | {"rope_theta": 1e5, "torch_dtype": "float32"}
    assert spelled["vision_config"] == {"dtype": "float32", "torch_dtype": "float32"}


def test_kinds_of_layers_with_their_own_rotary_embeddings() -> None:
    rope = {
        "full_attention": {"rope_theta": 1e6, "rope_type": "linear", "factor": 8.0},
        "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"},
    }
    spelled = spelled_for_all({"rope_parameters": rope})
    assert spelled == {
        "rope_parameters": rope,
        "rope_theta": 1e6,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        "rope_local_base_freq": 1e4,
    }


@pytest.mark.parametrize("form", ["pack-quantized", "int-quantized"])
def test_groups_say_how_they_are_stored(form: str) -> None:
    entry = {"format": form, "config_groups": {"group_0": {"targets": ["Linear"]}}}
    spelled = spelled_for_all({"quantization_config": entry})["quantization_config"]
    assert spelled["config_groups"]["group_0"] == {"targets": ["Linear"], "format": form}


def test_a_change_takes_its_older_spellings_away() -> None:
    config = {"rope_theta": 1e4, "rope_scaling": {"type": "su"}, "torch_dtype": "float16", "vocab_size": 9}
    rope = {"rope_theta": 5e5, "rope_type": "default"}
    changed = without_stale(config, {"rope_parameters": rope})
    assert changed == {"torch_dtype": "float16", "vocab_size": 9, "rope_parameters": rope}
    assert spelled_for_all(changed)["rope_theta"] == 5e5


def test_places_on_this_machine_are_left_out() -> None:
    text = {"_name_or_path": "/models/vicuna", "model_type": "llama"}
    seen = {"_name_or_path": "openai/clip-vit-large-patch14-336"}
    config = {"_name_or_path": r"C:\models\llava", "text_config": text, "vision_config": seen}
    assert spelled_for_all(config) == {"text_config": {"model_type": "llama"}, "vision_config": seen}
