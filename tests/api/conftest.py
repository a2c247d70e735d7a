"""A tiny Llama and a tiny LLaVA, each quantized once, from Python; not to be altered."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import eqat_mm
from tests.commands.conftest import memory_enough, tiny
from tests.tiny_llava import save_conversations, save_tiny_llava
from tests.tiny_model import Tiny

__all__ = ["memory_enough", "tiny"]

FEW: dict[str, Any] = {
    "calibration": {"length": 16, "count": 12},
    "fit": {"epochs": 1, "lr_weight": 2e-3, "validation_samples": 3},
    "precision": "float32",
}
"""Settings of Block-AP for a second of it."""

STEPS: dict[str, Any] = {
    "learning_rate": 2e-3,
    "max_steps": 3,
    "batch_size": 4,
    "accumulation": 1,
    "precision": "float32",
}
"""Settings of E2E-QP for a second of it."""

WINDOWS: dict[str, Any] = {"data": {"length": 16, "count": 24}}
HELD_OUT: dict[str, Any] = {"data.length": 16, "data.count": 4, "precision": "float32"}


@dataclass(frozen=True)
class Seeing:
    """Paths of a tiny LLaVA, of a text, and of conversations with their images."""

    folder: Path
    text: Path
    conversations: Path


@pytest.fixture(scope="session")
def seeing(tmp_path_factory: pytest.TempPathFactory, tiny: Tiny) -> Seeing:
    folder = tmp_path_factory.mktemp("seeing")
    save_tiny_llava(folder / "llava", dtype=torch.float32)
    return Seeing(folder / "llava", tiny.text, save_conversations(folder, 8))


@pytest.fixture(scope="session")
def packed(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of Block-AP on the tiny Llama, `runs/tiny/block-ap` in a folder of its own."""
    output = tmp_path_factory.mktemp("packed") / "runs" / "tiny" / "block-ap"
    quantized(tiny, output)
    return output


def quantized(tiny: Tiny, output: Path, model: Any = None, **more: Any) -> PreTrainedModel:
    """The tiny Llama at 2 bits."""
    given: dict[str, Any] = {"bits": 2, "group_size": 32, "text": tiny.text, "output": output, "settings": FEW}
    return eqat_mm.quantize(tiny.folder if model is None else model, **(given | more))


@torch.no_grad()
def logits_of(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(input_ids=torch.arange(2, 12)[None]).logits
    return found
