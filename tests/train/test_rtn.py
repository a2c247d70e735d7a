"""Round-to-nearest, block by block."""

from __future__ import annotations

from pathlib import Path

import pytest

from eqat_mm.blocks.source import open_model
from eqat_mm.checkpoint import verify_checkpoint
from eqat_mm.quant.spec import QuantSpec
from eqat_mm.train import rtn
from llava_adapters import arch_for
from tests.tiny_model import save_tiny


def test_memory_is_given_back_after_every_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Freed weights lie between what lives on: without it, the process grows by every block."""
    tiny = save_tiny(tmp_path, blocks=5)
    given_back: list[bool] = []
    release = rtn.release_freed_memory
    monkeypatch.setattr(rtn, "release_freed_memory", lambda: given_back.append(release()))
    opened = open_model(tiny.folder, arch_for("llama"))
    blocks = opened.blocks
    made = rtn.run_rtn(opened, QuantSpec(), tmp_path / "run", source="tiny", provenance={})
    assert len(given_back) == 5
    assert all(parameter.is_meta for block in blocks for parameter in block.parameters())
    assert verify_checkpoint(tmp_path / "run" / "model") == made
