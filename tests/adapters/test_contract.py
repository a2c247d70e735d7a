"""What every registered adapter must fulfil; a new one is tested here without further code."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from eqat_mm.contract import CHECKS, Case, NotHere
from eqat_mm.contract.checks import Check
from llava_adapters import arch_for, known_archs, mistral3
from llava_adapters.tiny import tiny_llava, tiny_llava_next
from llava_adapters.tiny_vlm import text_config, tiny_vlm


def tiny_ministral3() -> Any:
    """Return a tiny Mistral3 with the tower of Ministral-3, whose queries grow with their position, and its batches."""
    rope = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 8}
    rope |= {"beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1}
    return mistral3.tiny("ministral3", max_position_embeddings=32, rope_parameters=rope)


def tiny_pixtral() -> Any:
    """Return a tiny model in the layout of Pixtral-12B, which is a LLaVA's, and its batches."""
    fields: dict[str, Any] = {
        "image_token_index": 96,
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
    }
    text = text_config("mistral", head_dim=16, max_position_embeddings=256)
    return tiny_vlm("llava", mistral3.processor(1), text=text, vision=mistral3.PIXTRAL, image=mistral3.IMAGE, **fields)


CASES = known_archs() | {
    "llava, mistral tower": replace(arch_for("llava"), tiny=lambda: tiny_llava("mistral")),
    "llava, tied head": replace(arch_for("llava"), tiny=lambda: tiny_llava("llama", tie_word_embeddings=True)),
    "llava, pixtral tower": replace(arch_for("llava"), tiny=tiny_pixtral, processor=lambda: mistral3.processor(1)),
    "mistral3, ministral3 tower": replace(arch_for("mistral3"), tiny=tiny_ministral3),
    "llava_next, llama tower": replace(arch_for("llava_next"), tiny=lambda: tiny_llava_next("llama")),
}


ALIKE = (
    "gemma3_text",
    "granite",
    "llava, pixtral tower",
    "llava_next, llama tower",
    "llava_next_video",
    "ministral",
    "mistral3, ministral3 tower",
    "qwen2",
    "smollm3",
    "smolvlm",
    "vipllava",
)
"""Cases that differ from another one in what one or two checks look at."""

NEITHER = {"no `sums`", "no `norms`"}
WINDOWS = {"they are read for every question: some of its layers do not see the whole text (sliding windows)"}
COUNTS = {"they are read for every question: a position of its tokens is more than a count"}
REASONS = {
    "olmo2": NEITHER,
    "gemma3_text": NEITHER,
    "gemma3": NEITHER | WINDOWS,
    "paligemma": NEITHER | WINDOWS,
    "granite": {"no `sums`"},
    "llava": WINDOWS,
    "llava_next": WINDOWS,
    "mistral3": WINDOWS,
    "qwen2_5_vl": COUNTS,
    "qwen3_vl": COUNTS,
}
"""Why a check has nothing to do for an adapter, beside what its kind of model says."""

KINDS = {"a language model", "no experts", "transformers reads quantized experts on the symmetric grid only"}


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=pytest.mark.slow if name in ALIKE else ()) for name in sorted(CASES)],
)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(CASES[request.param], tmp_path_factory.mktemp("case"))


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: f"{check.__module__.rpartition('.')[2]}-{check.__name__}")
def test_the_contract(case: Case, check: Check) -> None:
    reason = ""
    try:
        check(case)
    except NotHere as found:
        reason = str(found)
    assert reason in {"", *KINDS, *REASONS.get(case.arch.name, ())}
