"""Whether a loaded model is still that of its files."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import eqat_mm
from eqat_mm.checkpoint.adapters import add_adapters
from eqat_mm.checkpoint.changed import is_as_loaded
from tests.checkpoint.conftest import Pack


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_as_loaded(pack: Pack, dtype: torch.dtype) -> None:
    assert is_as_loaded(eqat_mm.load(pack(), dtype=dtype))
    assert is_as_loaded(eqat_mm.load(pack(tie_word_embeddings=True), dtype=dtype))


@pytest.mark.parametrize("change", ["step size", "embedding", "code", "config", "adapters", "gone"])
def test_changed(pack: Pack, tmp_path: Path, change: str) -> None:
    shutil.copytree(pack(), tmp_path / "model")
    model: Any = eqat_mm.load(tmp_path / "model")
    linear = model.model.layers[0].self_attn.q_proj
    with torch.no_grad():
        if change == "step size":
            linear.weight_scale[0, 0] *= 1.1
        elif change == "embedding":
            model.model.embed_tokens.weight[0, 0] += 1
        elif change == "code":
            linear.weight_packed[0, 0] ^= 1
    if change == "config":
        model.config.rms_norm_eps = 1e-2
    elif change == "adapters":
        add_adapters(model, 2, 2, 0)
    elif change == "gone":
        shutil.rmtree(tmp_path / "model")
    assert not is_as_loaded(model)
