"""A tiny Llama and a tiny LLaVA, each quantized once, from Python; not to be altered."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from PIL import Image
from transformers import PreTrainedModel

import eqat_mm
from eqat_mm.plan import machine
from tests.tiny_llava import save_tiny_llava
from tests.tiny_model import Tiny, save_tiny

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


@pytest.fixture(autouse=True)
def memory_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    free = SimpleNamespace(available=2**40)
    monkeypatch.setattr(machine, "psutil", SimpleNamespace(Process=psutil.Process, virtual_memory=lambda: free))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return save_tiny(tmp_path_factory.mktemp("tiny"), blocks=2)


@pytest.fixture(scope="session")
def seeing(tmp_path_factory: pytest.TempPathFactory, tiny: Tiny) -> Seeing:
    folder = tmp_path_factory.mktemp("seeing")
    save_tiny_llava(folder / "llava", dtype=torch.float32)
    records = []
    for number in range(8):
        Image.new("RGB", (30 + number, 20), (30 * number, 90, 9)).save(folder / f"{number}.png")
        turns = [{"from": "human", "value": f"<image>\nw{5 + number}"}, {"from": "gpt", "value": f"w{9 + number}"}]
        records.append({"id": str(number), "image": f"{number}.png", "conversations": turns})
    (folder / "mix.json").write_text(json.dumps(records), encoding="utf-8")
    return Seeing(folder / "llava", tiny.text, folder / "mix.json")


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
