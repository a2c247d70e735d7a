"""A run beside the published one: judged where it is the same, shown where it is not."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from eqat_mm.cli import parse_job
from eqat_mm.plan.models import shipped_config
from eqat_mm.report.found import Stage
from eqat_mm.verify.checks import Check
from eqat_mm.verify.published import published_checks

LLAMA = shipped_config("llama-2-7b") or {}
FOUND = {"0": [7.6e-6, 7.3e-6], "6": [3.8e-4, 3.0e-4], "27": [9.0e-2, 8.0e-2]}


def checks(config: dict[str, Any], losses: dict[str, list[float]] = FOUND, **record: Any) -> dict[str, Check]:
    metrics = [{"block": int(block), "validation": each, "peak_bytes": 5.5e9} for block, each in losses.items()]
    stage = Stage("run", Path("run"), {"command": "block-ap", "config": config} | record, metrics, None, None)
    return {check.name: check for check in published_checks(stage, LLAMA)}


def recipe(spec: str, model: str = "llama-2-7b") -> dict[str, Any]:
    """Return the settings of a run as it records them."""
    words = ["--config", f"llama-2-{spec}-block-ap", "--model", model, "--output", "run"]
    return asdict(parse_job("block-ap", words))


@pytest.mark.parametrize("spec", ["w2g64", "w3g128", "w4g128"])
def test_our_recipe_has_the_published_settings(spec: str) -> None:
    assert checks(recipe(spec))["published run"].passed is True


def test_losses_and_memory_of_the_published_run_are_judged() -> None:
    found = checks(recipe("w4g128"), environment={"device": "cuda"})
    assert found["loss of block 0"].said == "7.3e-06, published 7.26e-06 (1.01)"
    assert [found[f"loss of block {block}"].passed for block in (0, 6, 27)] == [True, True, False]
    assert found["published memory"] == Check("published memory", True, "5.50 GB at the peak, published 8.5 GB")
    assert found["to be reached"].said.startswith("WikiText-2 perplexity 5.56, accuracy of five zero-shot tasks 64.07%")


def test_another_run_is_shown_and_not_judged() -> None:
    found = checks(recipe("w4g128", model="lmsys/vicuna-7b-v1.5"), environment={"device": "cuda"})
    assert found["published run"].said == "model vicuna-7b-v1.5, not Llama-2-7B"
    assert {check.passed for check in found.values()} == {None}


def test_another_shape_has_nothing_to_be_compared_with() -> None:
    stage = Stage("run", Path("run"), {"command": "block-ap", "config": {}}, [], None, None)
    assert list(published_checks(stage, LLAMA | {"hidden_size": 2048})) == []


def test_of_bits_of_each_linear_nothing_is_published() -> None:
    config = recipe("w2g64")
    (check,) = checks(config | {"quant": config["quant"] | {"allocation": "mixed.json"}}).values()
    assert check.passed is None
    assert "nothing is published" in check.said
