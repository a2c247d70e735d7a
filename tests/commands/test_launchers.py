"""E2E-QP as launchers start it: several processes give the result of one, and a killed one is not the end.

On a tiny LLaVA with image-text data, some samples without images, as `deepspeed --module eqat_mm e2e-qp`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from eqat_mm.commands.verbs.quantize import RTNJob, rtn
from eqat_mm.quant.spec import QuantSpec
from eqat_mm.runtime.files import read_json
from tests.checkpoint.files import tensors_of
from tests.commands.launching import (
    ALONE,
    DATA_PARALLEL,
    DEEPSPEED,
    TRAINING,
    assert_a_killed_run_is_continued,
    kill_a_process_of,
    losses,
    run,
    run_well,
    words_of,
)
from tests.tiny_llava import save_tiny_llava
from tests.tolerances import assert_close
from tests.train.cases import save_conversations

pytestmark = pytest.mark.slow
pytest.importorskip("deepspeed")

SAMPLES = 64
WATCHED = Path(__file__).with_name("watched_e2e_qp.py")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny LLaVA, its packed copy, and conversations, of which every fourth is about no image."""
    folder = tmp_path_factory.mktemp("launchers")
    save_tiny_llava(folder / "llava", dtype=torch.float32)
    rtn(RTNJob(model=str(folder / "llava"), output=folder / "rtn", quant=QuantSpec(2, 32)))
    save_conversations(folder / "mixed.json", SAMPLES)
    records = json.loads((folder / "mixed.json").read_text(encoding="utf-8"))
    images = [record for record in records if "image" in record]
    (folder / "images.json").write_text(json.dumps(images), encoding="utf-8")
    return folder


def command(place: Path, name: str, launcher: list[str], *, data: str = "mixed", **options: Any) -> list[str]:
    settings = TRAINING | {
        "model": place / "llava",
        "quantized": place / "rtn" / "model",
        "output": place / name,
        "conversations.source": place / f"{data}.json",
        "trains": "scales+projector",
        "loss": "kl",
        "learning_rate": 2e-3,
    }
    return words_of(launcher, "e2e-qp", settings | options)


def assert_same_result(place: Path, name: str, other: str) -> None:
    """The same losses within the tolerance of a model, and the same step sizes in their storage dtype."""
    assert len(losses(place / name)) == len(losses(place / other)) > 0
    assert_close(losses(place / name), losses(place / other), "model")
    left, right = tensors_of(place / name / "model"), tensors_of(place / other / "model")
    assert left.keys() == right.keys()
    for key in left:
        assert_close(left[key].float(), right[key].float(), "model")


@pytest.fixture(scope="module", params=["mixed", "images"])
def alone(place: Path, request: pytest.FixtureRequest) -> str:
    """A run in one process on batches of 8, named after its data."""
    run_well(command(place, request.param, ALONE, data=request.param, batch_size=8))
    return str(request.param)


@pytest.mark.parametrize("settings", ["zero-1", "zero-2", "zero-2-offload", "zero-3"])
def test_two_deepspeed_processes_train_as_one(place: Path, alone: str, settings: str) -> None:
    name = f"{alone}-{settings}"
    run_well(command(place, name, DEEPSPEED, data=alone, batch_size=4, deepspeed=settings))
    assert_same_result(place, name, alone)
    assert not list(Path("/dev/shm").glob(f"deepspeed*_{DEEPSPEED[-1]}_*"))


def test_data_parallel_without_deepspeed_trains_as_one(place: Path, alone: str) -> None:
    run_well(command(place, f"{alone}-ddp", DATA_PARALLEL, data=alone, batch_size=4))
    assert_same_result(place, f"{alone}-ddp", alone)


@pytest.mark.parametrize("settings", ["zero-1", "zero-2", "zero-3", None])
def test_kernels_see_the_precision_that_was_asked_for(place: Path, settings: str | None) -> None:
    launcher = DATA_PARALLEL if settings is None else DEEPSPEED
    options = {} if settings is None else {"deepspeed": settings}
    words = command(
        place, f"watched-{settings}", launcher, data="images", batch_size=4, precision="bfloat16", **options
    )
    at = words.index("e2e-qp") - 2  # behind the launcher: its word for a module, and the module
    said = run_well([*words[:at], str(WATCHED), *words[at + 3 :]])
    assert said.count("kernels saw ['torch.bfloat16']") == 2


def test_a_run_goes_on_in_one_process_and_says_so(place: Path) -> None:
    options: dict[str, Any] = {"batch_size": 4, "global_batch": 8, "save_steps": 2}
    words = command(place, "moved", DEEPSPEED, deepspeed="zero-2", **options | {"max_steps": 90})
    assert kill_a_process_of(words, place / "moved" / "trainer") != 0
    refused = run(command(place, "moved", ALONE, batch_size=4, max_steps=90, save_steps=2))
    assert refused.returncode == 2
    assert "samples_per_step=4" in refused.stderr
    assert "--global_batch" in refused.stderr
    said = run_well(command(place, "moved", ALONE, **options | {"max_steps": 90}))
    assert "processes 1 (was 2)" in said
    record = read_json(place / "moved" / "run.json")
    assert record["environment"]["processes"] == 2
    assert record["config"]["accumulation"] == 1
    assert record["decides"]["samples_per_step"] == 8
    whole = command(place, "alone-90", ALONE, **options | {"max_steps": 90})
    run_well(whole)
    assert_same_result(place, "moved", "alone-90")


@pytest.mark.parametrize("settings", [None, "zero-1", "zero-2", "zero-3"])
def test_a_killed_process_ends_the_run_and_the_same_command_continues_it(place: Path, settings: str | None) -> None:
    options: dict[str, Any] = {"batch_size": 4, "max_steps": 90, "save_steps": 10, "logging_steps": 10}
    options |= {} if settings is None else {"deepspeed": settings}
    launcher, kind = DATA_PARALLEL if settings is None else DEEPSPEED, settings or "ddp"
    assert_a_killed_run_is_continued(
        lambda name: command(place, f"{name}-{kind}", launcher, **options),
        place / f"whole-{kind}",
        place / f"killed-{kind}",
    )
