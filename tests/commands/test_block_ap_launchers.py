"""Block-AP as launchers start it: two processes give the result of one, and a killed one is not the end."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from eqat_mm.commands.plumbing.launchers import free_port
from eqat_mm.runtime.files import read_json
from tests.checkpoint.files import same_weights
from tests.commands.launching import ALONE, DATA_PARALLEL, environment, run, run_well, words_of
from tests.tiny_model import Tiny, save_tiny
from tests.train.results import assert_same_result

pytestmark = pytest.mark.slow

BLOCKS = 3
ACCELERATE = [  # with --cpu it would start a single process
    *(sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"),
    *("--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", str(free_port())),
]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return save_tiny(tmp_path_factory.mktemp("launchers"), blocks=BLOCKS)


def command(tiny: Tiny, launcher: list[str], output: Path, **options: Any) -> list[str]:
    settings = {
        "model": tiny.folder,
        "output": output,
        "quant.group_size": 32,
        "fit.epochs": 12,
        "fit.batch_size": 4,
        "fit.lanes": 2,
        "fit.lr_weight": 1e-4,
        "fit.lr_scale": 1e-4,
        "fit.loss": "balanced",
        "fit.validation_samples": 5,
        "calibration.source": tiny.text,
        "calibration.length": 16,
        "calibration.count": 25,
        "precision": "float32",
        "device": "cpu",
    }
    return words_of(launcher, "block-ap", settings | options)


@pytest.fixture(scope="module")
def alone(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in one process."""
    folder = tmp_path_factory.mktemp("alone")
    run_well(command(tiny, ALONE, folder))
    return folder


@pytest.fixture(scope="module")
def two(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in two processes, never stopped."""
    folder = tmp_path_factory.mktemp("two")
    said = run_well(command(tiny, DATA_PARALLEL, folder))
    assert said.count("block 1/3") == said.count("checkpoint:") == 1
    return folder


def test_two_processes_train_as_one(alone: Path, two: Path) -> None:
    assert_same_result(two, alone)
    assert {path.name for path in two.iterdir()} == {"model", "metrics.jsonl", "run.json", "state.json"}


def test_accelerate_launches_it(tiny: Tiny, two: Path, tmp_path: Path) -> None:
    run_well(command(tiny, ACCELERATE, tmp_path))
    assert same_weights(tmp_path / "model", two / "model")


@pytest.mark.parametrize("kept", [("ram", "recompute"), ("disk", "files")])
def test_a_killed_process_ends_the_run_and_any_number_continues_it(
    tiny: Tiny, alone: Path, two: Path, tmp_path: Path, kept: tuple[str, str]
) -> None:
    options = {"spool": kept[0], "commit": kept[1]}
    killed, by_one = tmp_path / "killed", tmp_path / "by-one"
    assert kill_second_process(command(tiny, DATA_PARALLEL, killed, **options), killed / "state.json") != 0
    assert 0 < len(read_json(killed / "state.json")["records"]) < BLOCKS
    assert not (killed / "model" / "eqat.json").exists()
    shutil.copytree(killed, by_one)
    assert "block 1/" not in run_well(command(tiny, DATA_PARALLEL, killed, **options))
    assert same_weights(killed / "model", two / "model")
    assert "block 1/" not in run_well(command(tiny, ALONE, by_one, **options))
    assert_same_result(by_one, alone)


def kill_second_process(words: list[str], sign: Path) -> int:
    """Start a launcher, kill its second process once the first block is committed; return the launcher's status."""
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment()) as launcher:
        while not sign.exists():
            assert launcher.poll() is None, "the run ended before its first commit"
            time.sleep(0.005)
        (second,) = (
            process
            for process in psutil.Process(launcher.pid).children(recursive=True)
            if process.environ().get("LOCAL_RANK") == "1"
        )
        second.send_signal(signal.SIGKILL)
        return launcher.wait()


@pytest.mark.parametrize(
    ("settings", "said"),
    [({"fit.batch_size": 1, "fit.lanes": 1}, "--fit.batch_size"), ({"calibration.count": 1}, "--calibration.count")],
)
def test_more_processes_than_samples(tiny: Tiny, tmp_path: Path, settings: dict[str, Any], said: str) -> None:
    done = run(command(tiny, DATA_PARALLEL, tmp_path / "run", **settings))
    assert done.returncode != 0
    assert f"where:   {said}, with 2 processes" in done.stderr
    assert done.stderr.count("allowed:") == 1
    assert not (tmp_path / "run").exists()


def test_processes_with_different_settings(tiny: Tiny, tmp_path: Path) -> None:
    """As where two machines are given two commands."""
    port, processes = str(free_port()), []
    for rank in range(2):
        place = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        words = command(tiny, ALONE, tmp_path / "run", seed=rank)
        processes.append(
            subprocess.Popen(words, stderr=subprocess.PIPE, text=True, env=environment() | place | {"LOCAL_RANK": "0"})
        )
    errors = [process.communicate()[1] for process in processes]
    assert [process.returncode for process in processes] == [2, 2]
    assert "process 1 of 2: seed" in errors[0]
    assert "allowed:" not in errors[1]
    assert not (tmp_path / "run").exists()
