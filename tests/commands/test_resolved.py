"""Python's values as they are typed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from eqat_mm.commands.quantize import BlockAPJob
from eqat_mm.commands.resolved import job_of, words_of
from eqat_mm.data.text_settings import TextSource
from eqat_mm.errors import ConfigError
from eqat_mm.quant.spec import QuantSpec
from eqat_mm.train.fit import FitConfig


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"seed": 3}, ["--seed=3"]),
        ({"max_steps": None}, ["--max_steps=null"]),
        ({"overwrite": True}, ["--overwrite=true"]),
        ({"output": Path("a b")}, ["--output=a b"]),
        ({"fit": {"epochs": 2, "lr_weight": 1e-5}}, ["--fit.epochs=2", "--fit.lr_weight=1e-05"]),
        ({"precision": torch.bfloat16}, ["--precision=bfloat16"]),
        ({"quant": QuantSpec(3)}, [f"--quant.{n}={v}" for n, v in (("bits", 3), ("group_size", 64))]),
        ({"x": [1, Path("p")]}, ['--x=[1, "p"]']),
        ({"fit": {}}, []),
    ],
    ids=str,
)
def test_values(settings: dict[str, Any], words: list[str]) -> None:
    assert words_of(settings)[:2] == words


def test_what_is_typed_is_read_again() -> None:
    sources = [TextSource("a.txt", 2.0), TextSource("b, c.txt")]
    settings = {
        "model": "--odd: name",
        "calibration.source": sources,
        "fit": FitConfig(lr_weight=3e-7),
        "spool": "disk",
    }
    job = job_of("block-ap", BlockAPJob, words_of(settings, {"quant.group_size": -1}))
    assert (job.model, job.fit, job.spool) == ("--odd: name", FitConfig(lr_weight=3e-7), "disk")
    assert job.calibration.source == sources
    assert job.quant.group_size == -1


@pytest.mark.parametrize("given", [({"a": 1}, {"a": 2}), ({"fit.epochs": 1, "fit": {"epochs": 1}},), ({"h": 1},)])
def test_twice_or_not_for_python(given: tuple[dict[str, Any], ...]) -> None:
    with pytest.raises(ConfigError, match=r"twice|in Python"):
        words_of(*given)
