"""Tiny models in folders, full precision and packed."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from eqat_mm.blocks.source import open_model
from eqat_mm.quant.spec import QuantSpec
from eqat_mm.train.rtn import run_rtn
from llava_adapters import arch_for
from tests.tiny_model import tiny_llama

Pack = Callable[..., Path]
PROVENANCE = {"command": "eqat rtn", "seed": 0}


def save_llama(folder: Path, **changes: Any) -> None:
    """Save a random two-block Llama in bfloat16."""
    model = tiny_llama(**changes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                nn.init.normal_(parameter)
    nn.Module.to(model, torch.bfloat16)
    model.save_pretrained(folder)


@pytest.fixture(scope="session")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Pack:
    """Returns the checkpoint of a tiny Llama for a spec and changes of its config; made once, not to be altered."""
    made: dict[tuple[Any, ...], Path] = {}

    def packed(spec: QuantSpec | None = None, **changes: Any) -> Path:
        spec = spec or QuantSpec(bits=3, group_size=32)
        key = (repr(spec), *sorted(changes.items()))
        if key not in made:
            folder = tmp_path_factory.mktemp(spec.name)
            save_llama(folder / "full", **changes)
            opened = open_model(folder / "full", arch_for("llama"))
            run_rtn(opened, spec, folder, source="tiny-llama", provenance=PROVENANCE)
            made[key] = folder / "model"
        return made[key]

    return packed


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(0, 97, (2, 9), generator=torch.Generator().manual_seed(4))


@pytest.fixture
def folder(pack: Pack, tmp_path: Path) -> Path:
    """A checkpoint to be altered."""
    shutil.copytree(pack(), tmp_path / "model")
    return tmp_path / "model"
