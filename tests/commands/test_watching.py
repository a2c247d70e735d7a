"""Runs that are watched: numbers while they go, conversations to judge them by, dashboards."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from eqat_mm.commands.plumbing import launchers
from eqat_mm.commands.verbs import quantize
from eqat_mm.commands.verbs.llm_qat import llm_qat
from eqat_mm.commands.verbs.quantize import RTNJob, block_ap, rtn
from eqat_mm.commands.verbs.tune import E2EQPJob, e2e_qp
from eqat_mm.data.image_text.settings import ImageTextData
from eqat_mm.errors import ConfigError, DataError
from eqat_mm.runtime import reporting
from eqat_mm.runtime.reporting import Reporter
from eqat_mm.train import block_ap as trainer
from tests.checkpoint.files import assert_four_lines
from tests.commands.jobs import SIX_STEPS, SPEC, block_ap_job, e2e_qp_job, llm_qat_job, rtn_job
from tests.tiny_llava import save_tiny_llava
from tests.tiny_model import Tiny
from tests.train.cases import save_conversations
from tests.train.stopping import Stopped, stop_at_step


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny LLaVA, its packed copy, and conversations."""
    folder = tmp_path_factory.mktemp("watching")
    save_tiny_llava(folder / "llava", dtype=torch.float32)
    rtn(RTNJob(model=str(folder / "llava"), output=folder / "rtn", quant=SPEC))
    save_conversations(folder / "mixed.json")
    return folder


def job_on(place: Path, output: Path, conversations: dict[str, Any], **changes: Any) -> E2EQPJob:
    data = ImageTextData(source=str(place / "mixed.json"), **conversations)
    settings = SIX_STEPS | {"device": "cpu", "held_out_steps": 3, "recipe_for": (str(place / "llava"),)}
    kept = place / "rtn" / "model"
    settings |= {"model": str(place / "llava"), "quantized": kept, "output": output, "conversations": data}
    return E2EQPJob(**(settings | changes))


def judged(run: Path) -> list[dict[str, Any]]:
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [record for record in map(json.loads, lines) if "held_out_loss" in record]


@pytest.mark.parametrize("loss", ["cross-entropy", "kl"])
def test_conversations_are_held_out(place: Path, tmp_path: Path, loss: Any) -> None:
    e2e_qp(job_on(place, tmp_path / "run", {"held_out": 5}, loss=loss))
    found = judged(tmp_path / "run")
    assert [record["step"] for record in found] == [0, 3, 6]
    assert all(record["held_out_kl"] > 0 for record in found)
    if loss == "kl":
        assert found[-1]["held_out_kl"] < found[0]["held_out_kl"]


def test_conversations_of_another_file_need_no_full_precision_model(place: Path, tmp_path: Path) -> None:
    other = {"held_out_source": str(place / "mixed.json")}
    e2e_qp(job_on(place, tmp_path / "run", other, held_out_kl=False, keep_best=True, model="a/b", recipe_for=("a/b",)))
    found = judged(tmp_path / "run")
    assert len(found) == 3
    assert all("held_out_kl" not in record for record in found)


def test_something_is_left_to_train_on(place: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="23 of 23 samples") as raised:
        e2e_qp(job_on(place, tmp_path / "run", {"held_out": 23}))
    assert_four_lines(raised.value)
    assert not (tmp_path / "run").exists()


def test_the_best_of_nothing_is_refused(place: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--conversations\.held_out") as raised:
        e2e_qp(job_on(place, tmp_path / "run", {}, keep_best=True))
    assert_four_lines(raised.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("command", ["block-ap", "e2e-qp", "llm-qat"])
def test_a_dashboard_that_is_not_installed_is_named_before_anything_is_done(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.setattr(reporting, "find_spec", lambda _: None)
    commands: dict[str, Callable[[], Any]] = {
        "block-ap": lambda: block_ap(block_ap_job(tiny, tmp_path / "run", report_to="wandb")),
        "e2e-qp": lambda: e2e_qp(e2e_qp_job(tiny, tmp_path, tmp_path / "run", report_to="wandb")),
        "llm-qat": lambda: llm_qat(llm_qat_job(tiny, tmp_path / "run", report_to="wandb")),
    }
    with pytest.raises(ConfigError, match="pip install wandb"):
        commands[command]()
    assert not (tmp_path / "run").exists()


class Kept(Reporter):
    """Keeps what it is told, of what begins again only the last."""

    def __init__(self) -> None:
        self.told: list[tuple[int, Any]] = []

    def begin(self, step: int) -> None:
        self.told = [each for each in self.told if each[0] <= step]

    def add(self, step: int, numbers: Any) -> None:
        self.told.append((step, numbers))


@pytest.mark.parametrize("command", ["block-ap", "e2e-qp", "llm-qat"])
@pytest.mark.parametrize("stopped", [False, True], ids=["whole", "continued"])
def test_a_dashboard_has_what_the_file_has(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, stopped: bool
) -> None:
    kept, run = Kept(), tmp_path / "run"
    for module in (quantize, launchers):
        monkeypatch.setattr(module, "reported", lambda *_: nullcontext(kept))
    base = rtn(rtn_job(tiny, tmp_path / "rtn"))
    commands: dict[str, Callable[[], Any]] = {
        "block-ap": lambda: block_ap(block_ap_job(tiny, run)),
        "e2e-qp": lambda: e2e_qp(e2e_qp_job(tiny, base, run, save_steps=2)),
        "llm-qat": lambda: llm_qat(llm_qat_job(tiny, run, save_steps=2)),
    }
    if stopped:
        with pytest.MonkeyPatch.context() as patch:
            stop_at_step(patch, 4)
            stop_at_block(patch, 1)
            with pytest.raises(Stopped):
                commands[command]()
        assert kept.told
    commands[command]()
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [numbers for _, numbers in kept.told] == records
    assert [step for step, _ in kept.told] == [
        record["step"] if "step" in record else record["block"] + 1 for record in records
    ]


def stop_at_block(patch: pytest.MonkeyPatch, index: int) -> None:
    """Stop Block-AP before a block is trained."""
    train = trainer.quantize_block

    def stopping(walker: Any, step: Any, config: Any) -> Any:
        if step.index == index:
            raise Stopped
        return train(walker, step, config)

    patch.setattr(trainer, "quantize_block", stopping)
