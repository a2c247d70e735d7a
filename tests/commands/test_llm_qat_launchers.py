"""LLM-QAT as launchers start it: several processes give the result of one, and a killed one is not the end."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoint.files import tensors_of
from tests.commands.test_launchers import ROOT, kill_a_process_of, losses, run
from tests.tiny_model import Tiny, save_tiny
from tests.tolerances import assert_close

pytestmark = pytest.mark.slow
pytest.importorskip("deepspeed")

SCRIPT = str(ROOT / "scripts" / "llm_qat.py")
LAUNCHER = [str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", "2", SCRIPT]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tiny]:
    folder = tmp_path_factory.mktemp("launchers")
    return folder, save_tiny(folder)


def command(place: tuple[Path, Tiny], name: str, launcher: list[str], **options: Any) -> list[str]:
    folder, tiny = place
    settings = {
        "model": tiny.folder,
        "output": folder / name,
        "bits": "4-8-4",
        "smooth": 0.5,
        "smooth_samples": 4,
        "data.source": tiny.text,
        "data.length": 16,
        "data.count": 48,
        "learning_rate": 1e-3,
        "max_steps": 6,
        "accumulation": 1,
        "logging_steps": 1,
        "save_steps": 0,
        "precision": "float32",
        "device": "cpu",
    }
    flags = [word for key, value in (settings | options).items() for word in (f"--{key}", str(value))]
    return [*launcher, *flags]


@pytest.fixture(scope="module")
def alone(place: tuple[Path, Tiny]) -> str:
    """A run in one process on batches of 8."""
    done = run(command(place, "alone", [sys.executable, SCRIPT], batch_size=8))
    assert done.returncode == 0, done.stderr
    return "alone"


def assert_same_result(folder: Path, name: str, other: str) -> None:
    """The same losses, and the same weights but for a code here and there, which a last bit can tip over."""
    assert len(losses(folder, name)) == len(losses(folder, other)) == 6
    assert_close(losses(folder, name), losses(folder, other), "model")
    left, right = tensors_of(folder / name / "model"), tensors_of(folder / other / "model")
    assert left.keys() == right.keys()
    for key in left:
        if key.endswith("weight_packed"):
            assert (left[key] != right[key]).float().mean() < 0.01
        else:
            assert_close(left[key].float(), right[key].float(), "model")


@pytest.mark.parametrize("settings", ["zero-1", "zero-2", "zero-3"])
def test_two_deepspeed_processes_train_as_one(place: tuple[Path, Tiny], alone: str, settings: str) -> None:
    done = run(command(place, settings, LAUNCHER, batch_size=4, deepspeed=settings))
    assert done.returncode == 0, done.stderr
    assert_same_result(place[0], settings, alone)


def test_data_parallel_without_deepspeed_trains_as_one(place: tuple[Path, Tiny], alone: str) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", SCRIPT]
    done = run(command(place, "ddp", launcher, batch_size=4))
    assert done.returncode == 0, done.stderr
    assert_same_result(place[0], "ddp", alone)


def test_a_killed_process_ends_the_run_and_the_same_command_continues_it(place: tuple[Path, Tiny]) -> None:
    folder, _ = place
    options = {"batch_size": 4, "deepspeed": "zero-2", "max_steps": 60, "save_steps": 10, "logging_steps": 10}
    done = run(command(place, "whole", LAUNCHER, **options))
    assert done.returncode == 0, done.stderr
    killed = command(place, "killed", LAUNCHER, **options)
    assert kill_a_process_of(killed, folder / "killed" / "trainer") != 0
    assert not (folder / "killed" / "model").exists()
    done = run(killed)
    assert done.returncode == 0, done.stderr
    assert 0 < done.stdout.count("{'loss'") < len(losses(folder, "whole"))
    left, right = tensors_of(folder / "killed" / "model"), tensors_of(folder / "whole" / "model")
    assert all(torch.equal(left[key], right[key]) for key in right)
