"""A tiny model, its packed twin and windows of its text, made once, not to be altered; a walker and a block to fit."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers
from torch import Tensor

from eqat_mm.blocks.source import open_model
from eqat_mm.blocks.walker import BlockStep, BlockWalker
from eqat_mm.checkpoint.folders import load_tokenizer
from eqat_mm.commands.models import load_model
from eqat_mm.data.windows import text_windows
from eqat_mm.quant.spec import QuantSpec
from eqat_mm.train.rtn import run_rtn
from llava_adapters.llama import ARCH
from tests.tiny_model import Tiny, save_tiny
from tests.train.problems import CPU, step_to_fit, walker_of


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return save_tiny(tmp_path_factory.mktemp("tiny"), blocks=3)


@pytest.fixture(scope="session")
def windows(tiny: Tiny) -> Tensor:
    """24 windows of the text, [24, 16]."""
    return text_windows(load_tokenizer(tiny.folder), tiny.windows(24))


@pytest.fixture(scope="session")
def teacher(tiny: Tiny) -> transformers.PreTrainedModel:
    return load_model(tiny.folder, CPU)


@pytest.fixture(scope="session")
def packed(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Round-to-nearest of the tiny model, 2 bits in groups of 32."""
    folder = tmp_path_factory.mktemp("packed")
    run_rtn(open_model(tiny.folder, ARCH), QuantSpec(2, 32), folder, source="tiny", provenance={"config": {}})
    return folder / "model"


@pytest.fixture
def walker(tiny: Tiny) -> BlockWalker:
    return walker_of(tiny)


@pytest.fixture
def step(walker: BlockWalker) -> BlockStep:
    return step_to_fit(walker)
