"""A tiny checkpoint, its base and its tuned successor."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import eqat_mm
from eqat_mm.blocks.source import open_model
from eqat_mm.checkpoint import save_like
from eqat_mm.quant.spec import QuantSpec
from eqat_mm.train.rtn import run_rtn
from llava_adapters import arch_for
from llava_adapters.tiny_processor import word_tokenizer
from tests.checkpoint.conftest import save_llama
from tests.tiny_model import mixed_bits


@dataclass(frozen=True)
class Made:
    """Folders of a full-precision model, of its rounded checkpoint, and of that with other step sizes."""

    base: Path
    rounded: Path
    tuned: Path


def make(folder: Path, spec: QuantSpec, **changes: Any) -> Made:
    """Round a tiny Llama with changes of its configuration."""
    made = Made(folder / "base", folder / "rtn" / "model", folder / "e2e-qp" / "model")
    save_llama(made.base, **changes)
    word_tokenizer().save_pretrained(made.base)
    rounding = {"command": "rtn", "config": {"model": str(made.base)}, "seed": 0}
    opened = open_model(made.base, arch_for("llama"))
    run_rtn(opened, spec, folder / "rtn", source=str(made.base), provenance=rounding)
    model = eqat_mm.load(made.rounded)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.25)
    made.tuned.parent.mkdir()
    tuned = {"command": "e2e-qp", "config": {"quantized": str(made.rounded.parent), "trains": "scales"}, "seed": 0}
    save_like(model, made.tuned, made.rounded, "e2e-qp", tuned)
    return made


SPECS = (QuantSpec(3, 32), QuantSpec(2, 64, symmetric=True), QuantSpec(2, 32, allocation=mixed_bits()))


@pytest.fixture(scope="session", params=SPECS, ids=lambda one: one.name)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Not to be altered."""
    return make(tmp_path_factory.mktemp(request.param.name), request.param)


@pytest.fixture
def altered(made: Made, tmp_path: Path) -> Made:
    """The same, to be altered; the base stays where it is."""
    shutil.copytree(made.rounded.parent, tmp_path / "rtn")
    shutil.copytree(made.tuned.parent, tmp_path / "e2e-qp")
    return Made(made.base, tmp_path / "rtn" / "model", tmp_path / "e2e-qp" / "model")
