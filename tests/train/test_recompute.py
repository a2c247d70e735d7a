"""Which models recompute their activations."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from eqat_mm.checkpoint.read import load
from eqat_mm.train import recompute
from eqat_mm.train.recompute import recompute_where_it_pays, weights_of


@pytest.mark.parametrize(
    ("wanted", "device", "weights", "expected"),
    [
        ("auto", "cuda", 10**9, True),
        ("auto", "cuda", 10**9 - 1, False),
        ("auto", "cpu", 10**12, False),
        (False, "cuda", 10**12, False),
        (True, "cpu", 1, True),
    ],
)
def test_large_models_on_a_gpu_recompute_activations(
    monkeypatch: pytest.MonkeyPatch, wanted: Any, device: str, weights: int, expected: bool
) -> None:
    monkeypatch.setattr(recompute, "weights_of", lambda _: weights)
    arguments = SimpleNamespace(device=torch.device(device), activation_checkpointing=wanted is True)
    recompute_where_it_pays(wanted, nn.Identity(), arguments)  # type: ignore[arg-type]
    assert arguments.activation_checkpointing is expected


def test_packed_weights_are_counted(packed: Path, teacher: transformers.PreTrainedModel) -> None:
    assert weights_of(load(packed)) == sum(parameter.numel() for parameter in teacher.parameters())
