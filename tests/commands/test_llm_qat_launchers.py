"""LLM-QAT as launchers start it: several processes give the result of one, and a killed one is not the end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoint.files import tensors_of
from tests.commands.launching import (
    ALONE,
    DATA_PARALLEL,
    DEEPSPEED,
    TRAINING,
    assert_a_killed_run_is_continued,
    losses,
    run_well,
    words_of,
)
from tests.tiny_llava import save_tiny_llava
from tests.tiny_model import Tiny, save_tiny
from tests.tolerances import assert_close
from tests.train.cases import save_conversations

pytestmark = pytest.mark.slow
pytest.importorskip("deepspeed")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tiny]:
    folder = tmp_path_factory.mktemp("launchers")
    return folder, save_tiny(folder)


def command(place: tuple[Path, Tiny], name: str, launcher: list[str], **options: Any) -> list[str]:
    folder, tiny = place
    settings = TRAINING | {
        "model": tiny.folder,
        "output": folder / name,
        "bits": "4-8-4",
        "smooth": 0.5,
        "smooth_samples": 4,
        "data.source": tiny.text,
        "data.length": 16,
        "data.count": 48,
        "learning_rate": 1e-3,
    }
    return words_of(launcher, "llm-qat", settings | options)


@pytest.fixture(scope="module")
def alone(place: tuple[Path, Tiny]) -> str:
    """A run in one process on batches of 8."""
    run_well(command(place, "alone", ALONE, batch_size=8))
    return "alone"


def assert_same_result(folder: Path, name: str, other: str) -> None:
    """The same losses, and the same weights but for a code here and there, which a last bit can tip over."""
    assert len(losses(folder / name)) == len(losses(folder / other)) == 6
    assert_close(losses(folder / name), losses(folder / other), "model")
    left, right = tensors_of(folder / name / "model"), tensors_of(folder / other / "model")
    assert left.keys() == right.keys()
    for key in left:
        if key.endswith("weight_packed"):
            assert (left[key] != right[key]).float().mean() < 0.01
        else:
            assert_close(left[key].float(), right[key].float(), "model")


@pytest.mark.parametrize("settings", ["zero-1", "zero-2", "zero-3"])
def test_two_deepspeed_processes_train_as_one(place: tuple[Path, Tiny], alone: str, settings: str) -> None:
    said = run_well(command(place, settings, DEEPSPEED, batch_size=4, deepspeed=settings))
    assert ("the teacher is divided among 2 processes" in said) is (settings == "zero-3")
    assert_same_result(place[0], settings, alone)


def test_data_parallel_without_deepspeed_trains_as_one(place: tuple[Path, Tiny], alone: str) -> None:
    run_well(command(place, "ddp", DATA_PARALLEL, batch_size=4))
    assert_same_result(place[0], "ddp", alone)


def test_a_killed_process_ends_the_run_and_the_same_command_continues_it(place: tuple[Path, Tiny]) -> None:
    options = {"batch_size": 4, "deepspeed": "zero-2", "max_steps": 60, "save_steps": 10, "logging_steps": 10}
    assert_a_killed_run_is_continued(
        lambda name: command(place, name, DEEPSPEED, **options), place[0] / "whole", place[0] / "killed"
    )


# ---- conversations, and text among them ----------------------------------------------------------------


def on_conversations(place: tuple[Path, Tiny], name: str, launcher: list[str], **options: Any) -> list[str]:
    folder, _ = place
    if not (folder / "llava").exists():
        save_tiny_llava(folder / "llava", dtype=torch.float32)
        save_conversations(folder / "mixed.json")
    data = {"conversations.source": folder / "mixed.json", "conversations.held_out": 5, "text_share": 0.3}
    settings = {"model": folder / "llava", "held_out_steps": 3, "data.count": 9} | data
    return command(place, name, launcher, **(settings | options))


@pytest.fixture(scope="module")
def alone_on_conversations(place: tuple[Path, Tiny]) -> str:
    """A run in one process on batches of 8."""
    run_well(on_conversations(place, "alone-on-conversations", ALONE, batch_size=8))
    return "alone-on-conversations"


@pytest.mark.parametrize("settings", ["", "zero-2", "zero-3"])
def test_two_processes_learn_from_conversations_as_one(
    place: tuple[Path, Tiny], alone_on_conversations: str, settings: str
) -> None:
    name = f"conversations-{settings}"
    launcher, how = (DEEPSPEED, {"deepspeed": settings}) if settings else (DATA_PARALLEL, {})
    run_well(on_conversations(place, name, launcher, batch_size=4, **how))
    assert_same_result(place[0], name, alone_on_conversations)
    assert len(held_out_losses(place[0] / name)) == 3
    assert_close(held_out_losses(place[0] / name), held_out_losses(place[0] / alone_on_conversations), "model")


def held_out_losses(run: Path) -> torch.Tensor:
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return torch.tensor([record["held_out_kl"] for record in map(json.loads, lines) if "held_out_kl" in record])
