"""Commands under launchers, in processes of their own: started, killed, and what they leave."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from eqat_mm.commands.plumbing.launchers import free_port
from tests.checkpoint.files import tensors_of

ROOT = Path(__file__).parents[2]
ALONE = [sys.executable]
DEEPSPEED = [str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", "2", "--master_port", str(free_port())]
DATA_PARALLEL = [
    sys.executable,
    "-m",
    "torch.distributed.run",
    "--nproc_per_node",
    "2",
    "--master_port",
    str(free_port()),
]
TRAINING = {
    "max_steps": 6,
    "accumulation": 1,
    "logging_steps": 1,
    "save_steps": 0,
    "precision": "float32",
    "device": "cpu",
}
"""Settings of six optimizer steps."""


def words_of(launcher: list[str], command: str, settings: dict[str, Any]) -> list[str]:
    """The command line of a command under a launcher."""
    flags = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    return [*launcher, "--module" if launcher is DEEPSPEED else "-m", "eqat_mm", command, *flags]


def environment() -> dict[str, str]:
    """One thread a process, and the commands of this interpreter first."""
    return os.environ | {"OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


def run(words: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, capture_output=True, text=True, check=False, env=environment(), cwd=ROOT)


def run_well(words: list[str]) -> str:
    """Run a command that succeeds; return what it said."""
    done = run(words)
    assert done.returncode == 0, done.stderr
    return done.stdout


def losses(folder: Path) -> Tensor:
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return torch.tensor([record["loss"] for record in map(json.loads, lines) if "loss" in record])


def assert_a_killed_run_is_continued(command: Callable[[str], list[str]], whole: Path, killed: Path) -> None:
    """A run with a killed process ends without a model, and goes on to that of a whole run.

    Args:
        command: run of the name `whole` or `killed`.
        whole: folder of the first.
        killed: folder of the second.
    """
    run_well(command("whole"))
    assert kill_a_process_of(command("killed"), killed / "trainer") != 0
    assert not (killed / "model").exists()
    assert 0 < run_well(command("killed")).count("  loss ") < len(losses(whole))
    left, right = tensors_of(killed / "model"), tensors_of(whole / "model")
    assert all(torch.equal(left[key], right[key]) for key in right)


def kill_a_process_of(words: list[str], trainer: Path) -> int:
    """Start a launcher, kill its second process once there is a checkpoint, and return the launcher's exit status."""
    with subprocess.Popen(
        words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment(), cwd=ROOT
    ) as launcher:
        while not list(trainer.glob("checkpoint-*[0-9]/checkpoint.json")):
            assert launcher.poll() is None, "the run ended before its first checkpoint"
            time.sleep(0.05)
        second = min(_of_rank_1(psutil.Process(launcher.pid)), key=psutil.Process.create_time)
        second.send_signal(signal.SIGKILL)
        return launcher.wait()


def _of_rank_1(launcher: psutil.Process) -> list[psutil.Process]:
    """The second process that a launcher started, and what that one started."""
    return [process for process in launcher.children(recursive=True) if process.environ().get("LOCAL_RANK") == "1"]
