"""What adapters beside a checkpoint take."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

from eqat_mm.checkpoint.adapters import ADAPTER, adapter_bits


def test_adapters_count_with_the_bits_they_are_stored_in(tmp_path: Path) -> None:
    assert adapter_bits(tmp_path) == 0
    (tmp_path / ADAPTER).mkdir()
    factors = {"a": torch.zeros(4, 64), "b": torch.zeros(64, 4, dtype=torch.bfloat16)}
    save_file(factors, tmp_path / ADAPTER / "adapter_model.safetensors")
    assert adapter_bits(tmp_path) == 4 * 64 * 32 + 64 * 4 * 16
