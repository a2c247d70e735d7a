"""E2E-QP as launchers start it: several processes give the result of one, and a killed one is not the end.

On a tiny LLaVA with image-text data, some samples without images, as `deepspeed scripts/e2e_qp.py` on the command line.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from PIL import Image
from torch import Tensor

from eqat_mm.commands.quantize import RTNJob, rtn
from eqat_mm.quant.spec import QuantSpec
from tests.checkpoint.files import tensors_of
from tests.tiny_llava import save_tiny_llava
from tests.tolerances import assert_close

pytestmark = pytest.mark.slow
pytest.importorskip("deepspeed")

ROOT = Path(__file__).parents[2]
SCRIPT = str(ROOT / "scripts" / "e2e_qp.py")
LAUNCHER = [str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", "2", SCRIPT]
SAMPLES = 64


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny LLaVA, its packed copy, and conversations, of which every fourth is about no image."""
    folder = tmp_path_factory.mktemp("launchers")
    save_tiny_llava(folder / "llava", dtype=torch.float32)
    rtn(RTNJob(model=str(folder / "llava"), output=folder / "rtn", quant=QuantSpec(2, 32)))
    draw = torch.Generator().manual_seed(0)

    def words(most: int) -> str:
        count = int(torch.randint(1, most, (), generator=draw))
        return " ".join(f"w{word}" for word in torch.randint(5, 60, (count,), generator=draw).tolist())

    records = []
    for index in range(SAMPLES):
        about_image = index % 4 > 0
        turns = [
            {"from": "human", "value": f"<image>\n{words(8)}" if about_image else words(8)},
            {"from": "gpt", "value": words(6)},
        ]
        record: dict[str, Any] = {"id": str(index), "conversations": turns}
        if about_image:
            colour = tuple(torch.randint(0, 255, (3,), generator=draw).tolist())
            Image.new("RGB", (16, 16), colour).save(folder / f"{index}.png")
            record["image"] = f"{index}.png"
        records.append(record)
    (folder / "mixed.json").write_text(json.dumps(records), encoding="utf-8")
    images = [record for record in records if "image" in record]
    (folder / "images.json").write_text(json.dumps(images), encoding="utf-8")
    return folder


def command(place: Path, name: str, launcher: list[str], *, data: str = "mixed", **options: Any) -> list[str]:
    settings = {
        "model": place / "llava",
        "quantized": place / "rtn" / "model",
        "output": place / name,
        "conversations.source": place / f"{data}.json",
        "trains": "scales+projector",
        "loss": "kl",
        "learning_rate": 2e-3,
        "max_steps": 6,
        "accumulation": 1,
        "logging_steps": 1,
        "save_steps": 0,
        "precision": "float32",
        "device": "cpu",
    }
    flags = [word for key, value in (settings | options).items() for word in (f"--{key}", str(value))]
    return [*launcher, *flags]


def environment() -> dict[str, str]:
    """One thread a process, and the commands of this interpreter first."""
    return os.environ | {"OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


def run(words: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, capture_output=True, text=True, check=False, env=environment(), cwd=ROOT)


def losses(place: Path, name: str) -> Tensor:
    lines = (place / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return torch.tensor([record["loss"] for record in map(json.loads, lines) if "loss" in record])


def assert_same_result(place: Path, name: str, other: str) -> None:
    """The same losses within the tolerance of a model, and the same step sizes in their storage dtype."""
    assert len(losses(place, name)) == len(losses(place, other)) > 0
    assert_close(losses(place, name), losses(place, other), "model")
    left, right = tensors_of(place / name / "model"), tensors_of(place / other / "model")
    assert left.keys() == right.keys()
    for key in left:
        assert_close(left[key].float(), right[key].float(), "model")


@pytest.fixture(scope="module", params=["mixed", "images"])
def alone(place: Path, request: pytest.FixtureRequest) -> str:
    """A run in one process on batches of 8, named after its data."""
    done = run(command(place, request.param, [sys.executable, SCRIPT], data=request.param, batch_size=8))
    assert done.returncode == 0, done.stderr
    return str(request.param)


@pytest.mark.parametrize("settings", ["zero-1", "zero-2", "zero-2-offload", "zero-3"])
def test_two_deepspeed_processes_train_as_one(place: Path, alone: str, settings: str) -> None:
    if (alone, settings) == ("mixed", "zero-3"):
        pytest.skip("refused, see below")
    name = f"{alone}-{settings}"
    done = run(command(place, name, LAUNCHER, data=alone, batch_size=4, deepspeed=settings))
    assert done.returncode == 0, done.stderr
    assert_same_result(place, name, alone)


def test_data_parallel_without_deepspeed_trains_as_one(place: Path, alone: str) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", SCRIPT]
    done = run(command(place, f"{alone}-ddp", launcher, data=alone, batch_size=4))
    assert done.returncode == 0, done.stderr
    assert_same_result(place, f"{alone}-ddp", alone)


def test_zero_3_is_refused_where_some_samples_have_no_image(place: Path) -> None:
    done = run(command(place, "refused", LAUNCHER, batch_size=4, deepspeed="zero-3"))
    assert done.returncode != 0
    assert f"{SAMPLES // 4} of {SAMPLES} samples without images" in done.stderr
    assert "use --deepspeed zero-2" in done.stderr
    assert not (place / "refused").exists()


def test_a_killed_process_ends_the_run_and_the_same_command_continues_it(place: Path) -> None:
    options = {"batch_size": 4, "deepspeed": "zero-2", "max_steps": 120, "save_steps": 10, "logging_steps": 10}
    done = run(command(place, "whole", LAUNCHER, **options))
    assert done.returncode == 0, done.stderr
    killed = command(place, "killed", LAUNCHER, **options)
    assert kill_a_process_of(killed, place / "killed" / "trainer") != 0
    assert not (place / "killed" / "model").exists()
    done = run(killed)
    assert done.returncode == 0, done.stderr
    assert 0 < done.stdout.count("{'loss'") < len(losses(place, "whole"))
    left, right = tensors_of(place / "killed" / "model"), tensors_of(place / "whole" / "model")
    assert all(torch.equal(left[key], right[key]) for key in right)


def kill_a_process_of(words: list[str], trainer: Path) -> int:
    """Start a launcher, kill its second process once there is a checkpoint, and return the launcher's exit status."""
    with subprocess.Popen(
        words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment(), cwd=ROOT
    ) as launcher:
        while not list(trainer.glob("checkpoint-*/trainer_state.json")):
            assert launcher.poll() is None, "the run ended before its first checkpoint"
            time.sleep(0.05)
        (second,) = (
            process
            for process in psutil.Process(launcher.pid).children(recursive=True)
            if "--local_rank=1" in process.cmdline()
        )
        second.send_signal(signal.SIGKILL)
        return launcher.wait()
