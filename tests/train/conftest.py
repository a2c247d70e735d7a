"""A tiny model and its packed twin, made once; not to be altered."""

from __future__ import annotations

from pathlib import Path

import pytest

from eqat_mm.blocks.source import open_model
from eqat_mm.quant.spec import QuantSpec
from eqat_mm.train.rtn import run_rtn
from llava_adapters.llama import ARCH
from tests.tiny_model import Tiny, save_tiny


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return save_tiny(tmp_path_factory.mktemp("tiny"), blocks=3)


@pytest.fixture(scope="session")
def packed(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Round-to-nearest of the tiny model, 2 bits in groups of 32."""
    folder = tmp_path_factory.mktemp("packed")
    run_rtn(open_model(tiny.folder, ARCH), QuantSpec(2, 32), folder, source="tiny", provenance={"config": {}})
    return folder / "model"
