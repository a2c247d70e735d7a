"""Stopped runs and steps that are not finite under a launcher's process, which is the only one: DDP and ZeRO-1, -2, -3.

With two processes: `tests/commands/test_launchers.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from eqat_mm.commands.line.recipes import deepspeed_path
from eqat_mm.errors import TrainingError
from eqat_mm.train import end_to_end
from eqat_mm.train.checkpoints import checkpoints_in, read_trained
from eqat_mm.train.end_to_end import EndToEndTrainer
from eqat_mm.train.non_finite import IN_A_ROW
from tests.checkpoint.files import assert_four_lines, contents
from tests.tolerances import assert_close
from tests.train.cases import Case, cases_in, losses_of, trained_of
from tests.train.launched import forget_settings
from tests.train.problems import same
from tests.train.stopping import Stopped, stop_at_step

pytest.importorskip("deepspeed")
pytestmark = [
    pytest.mark.usefixtures("launched", "no_settings_of_another_test"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # DeepSpeed 0.19.8 calls old collectives; 2026-11-27
]

KINDS = ["ddp", "zero-1", "zero-2", "zero-3"]
CASES = [
    *((kind, "llama", "scales") for kind in KINDS),
    *((kind, "llama", "llm-qat") for kind in ("ddp", "zero-2", "zero-3")),
    *((kind, "llava", "scales+projector") for kind in ("ddp", "zero-2", "zero-3")),
    ("zero-2", "llava", "lora"),
]


@pytest.fixture(scope="module")
def case_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Case]:
    folder = tmp_path_factory.mktemp("cases")
    return lambda family, trains: cases_in(folder, family, trains)


def settings(kind: str) -> dict[str, Any]:
    return {"deepspeed": None if kind == "ddp" else str(deepspeed_path(kind))}


@pytest.mark.parametrize(("kind", "family", "trains"), CASES)
def test_stopped_equals_whole(
    case_of: Callable[[str, str], Case],
    kind: str,
    family: str,
    trains: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case, how = case_of(family, trains), settings(kind)
    whole, stopped_at_first, stopped, finished = (case.make() for _ in range(4))
    log = case.train(whole, tmp_path / "whole", **how)
    steps = stop_at_step(monkeypatch, 5)
    with pytest.raises(Stopped):
        case.train(stopped_at_first, tmp_path / "stopped", **how)
    again = case.train(stopped, tmp_path / "stopped", **how)
    assert len(steps) == 5 + 2
    assert losses_of(again) == losses_of(log)
    assert same(stopped, whole)
    case.train(finished, tmp_path / "whole", **how)
    assert len(steps) == 5 + 2
    assert same(finished, whole)


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_has_no_frozen_weights(case_of: Callable[[str, str], Case], kind: str, tmp_path: Path) -> None:
    case = case_of("llava", "scales")
    model = case.make()
    case.train(model, tmp_path, max_steps=2, **settings(kind))
    numbers = sum(value.numel() for value in trained_of(model).values())
    frozen = sum(value.nbytes for value in model.state_dict().values()) - 4 * numbers
    files = contents(tmp_path / "checkpoint-2")
    assert sum(map(len, files.values())) < 16 * numbers + 40_000 < frozen  # weights twice, two moments; settings
    assert {name: value.shape for name, value in read_trained(tmp_path / "checkpoint-2").items()} == {
        name: value.shape for name, value in trained_of(model).items()
    }


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("zero-1", "ddp"),
        ("ddp", "zero-2"),
        ("zero-2", "zero-3"),
        ("zero-3", "zero-1"),
        ("zero-2-offload", "zero-2-offload"),
        ("zero-3", "zero-2-offload"),
    ],
)
@pytest.mark.parametrize("trains", ["scales+projector", "lora"])
def test_a_run_goes_on_under_another_kind(
    case_of: Callable[[str, str], Case],
    before: str,
    after: str,
    trains: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case = case_of("llava", trains)
    whole, continued = case.make(), case.make()
    log = case.train(whole, tmp_path / "whole")
    steps = stop_at_step(monkeypatch, 5)
    with pytest.raises(Stopped):
        case.train(case.make(), tmp_path / "stopped", **settings(before))
    forget_settings()
    again = case.train(continued, tmp_path / "stopped", **settings(after))
    assert len(steps) == 5 + 2
    assert losses_of(again) == pytest.approx(losses_of(log), rel=1e-5)
    for name, value in trained_of(whole).items():
        assert_close(trained_of(continued)[name], value, "model")


def break_losses(monkeypatch: pytest.MonkeyPatch, steps: Callable[[int], bool]) -> None:
    real, seen = end_to_end.cross_entropy, [0]

    def loss(*args: Any) -> Tensor:
        seen[0] += 1
        return real(*args) * (math.nan if steps(seen[0]) else 1.0)

    monkeypatch.setattr(end_to_end, "cross_entropy", loss)


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_that_is_not_finite_is_as_if_it_had_a_rate_of_zero(
    case_of: Callable[[str, str], Case], kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights, moments and the optimizer's count of steps are those of a run without it; the schedule goes on."""
    case, how = case_of("llama", "scales"), settings(kind)
    rates: list[float] = []
    step = EndToEndTrainer.training_step

    def note(self: EndToEndTrainer, *args: Any) -> Tensor:
        rates.append(self.lr_scheduler.get_last_lr()[0])
        return step(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(EndToEndTrainer, "training_step", note)
        case.train(case.make(), tmp_path / "good", **how)
    expected, rates = rates, []
    with monkeypatch.context() as patch:
        patch.setattr(EndToEndTrainer, "training_step", note)
        break_losses(patch, lambda count: count == 6)
        model = case.make()
        log = case.train(model, tmp_path / "last", save_steps=1, **how)
    assert rates == expected
    assert [record.get("skipped") for record in log if "loss" in record] == [None] * 5 + [1]
    before, after = (read_trained(tmp_path / "last" / f"checkpoint-{step}") for step in (5, 6))
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("kind", KINDS)
def test_too_many_steps_end_training_at_a_finite_checkpoint(
    case_of: Callable[[str, str], Case], kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = case_of("llama", "scales")
    break_losses(monkeypatch, lambda count: count > 3)
    with pytest.raises(TrainingError, match=f"optimizer step {3 + IN_A_ROW + 1}") as raised:
        case.train(case.make(), tmp_path, max_steps=60, save_steps=2, **settings(kind))
    assert_four_lines(raised.value)
    newest = checkpoints_in(tmp_path)[0]
    assert f"{newest} is finite" in raised.value.allowed
    assert all(value.isfinite().all() for value in read_trained(newest).values())


@pytest.mark.parametrize(
    ("kind", "name"), [("zero-2", "model.norm.weight"), ("zero-3", "model.layers.1.mlp.down_proj.weight_scale")]
)
def test_a_broken_tensor_is_named(case_of: Callable[[str, str], Case], kind: str, name: str, tmp_path: Path) -> None:
    case = case_of("llama", "scales")
    model = case.make()
    parameter: nn.Parameter = model.get_parameter(name)
    with torch.no_grad():
        parameter.view(-1)[0] = math.nan
    with pytest.raises(TrainingError, match=f"optimizer step 1: {name}"):
        case.train(model, tmp_path, **settings(kind))
