"""A tiny model, its packed twin and windows of its text, made once, not to be altered; a walker and a block to fit."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers
from accelerate.state import AcceleratorState
from torch import Tensor

from eqat_mm.blocks.source import open_model
from eqat_mm.blocks.walker import BlockStep, BlockWalker
from eqat_mm.checkpoint.folders import load_tokenizer
from eqat_mm.commands.plumbing.launchers import free_port
from eqat_mm.commands.plumbing.models import load_model
from eqat_mm.data.text.windows import text_windows
from eqat_mm.quant.spec import QuantSpec
from eqat_mm.train.rtn import run_rtn
from llava_adapters.llama import ARCH
from tests.tiny_model import Tiny, save_tiny
from tests.train.launched import forget_deepspeed, forget_settings
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


@pytest.fixture(scope="module")
def launched() -> Iterator[None]:
    """The only process of a launcher, from the first test that asks for it on."""
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    with pytest.MonkeyPatch.context() as environment:
        for name, value in (place | {"MASTER_PORT": str(free_port())}).items():
            environment.setenv(name, value)
        yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    forget_deepspeed()
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def no_settings_of_another_test() -> Iterator[None]:
    """DeepSpeed and accelerate forget what a test told them."""
    yield
    forget_settings()
