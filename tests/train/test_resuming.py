"""A stopped run ends with the bytes of an undisturbed one: whatever is trained, wherever it was stopped."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from eqat_mm.errors import ConfigError
from eqat_mm.train.end_to_end import EndToEndTrainer
from tests.checkpoint.files import assert_four_lines, contents
from tests.train.cases import Case, cases_in, losses_of, trained_of
from tests.train.problems import same
from tests.train.stopping import Stopped, stop_at_step

CASES = [
    *(("llama", trains) for trains in ("scales", "lora", "llm-qat")),
    *(("llava", trains) for trains in ("scales", "projector", "scales+projector", "lora", "lora+projector", "llm-qat")),
    *(("llava_next", trains) for trains in ("scales+projector", "llm-qat")),
]
LENGTHS: dict[str, dict[str, Any]] = {
    "max_steps within an epoch": {"max_steps": 4},
    "half an epoch": {"max_steps": None, "epochs": 0.5},
    "two epochs": {"max_steps": None, "epochs": 2.0},
    "rare checkpoints": {"max_steps": 4, "save_steps": 100},
}


@pytest.fixture(scope="module")
def case_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Case]:
    folder = tmp_path_factory.mktemp("cases")
    return lambda family, trains: cases_in(folder, family, trains)


def stop_before_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stop once between the last checkpoint and the end of a run."""
    real: Callable[..., Any] = EndToEndTrainer.train

    def train(self: EndToEndTrainer, **kwargs: Any) -> Any:
        real(self, **kwargs)
        monkeypatch.undo()
        raise Stopped

    monkeypatch.setattr(EndToEndTrainer, "train", train)


def no_more_training(monkeypatch: pytest.MonkeyPatch) -> None:
    def train(self: EndToEndTrainer, **kwargs: Any) -> Any:
        raise AssertionError("it trains again")

    monkeypatch.setattr(EndToEndTrainer, "train", train)


@pytest.mark.parametrize(("family", "trains"), CASES)
def test_stopped_equals_whole(
    case_of: Callable[[str, str], Case], family: str, trains: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = case_of(family, trains)
    whole, stopped = case.make(), case.make()
    start = {name: value.clone() for name, value in whole.named_parameters()}
    log = case.train(whole, tmp_path / "whole")
    assert all(not torch.equal(value, start[name]) for name, value in trained_of(whole).items())
    steps = stop_at_step(monkeypatch, 5)
    with pytest.raises(Stopped):
        case.train(case.make(), tmp_path / "stopped")
    again = case.train(stopped, tmp_path / "stopped")
    assert len(steps) == 5 + 2  # the first four steps were saved
    assert losses_of(again) == losses_of(log)
    assert same(stopped, whole)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize(("family", "trains"), [("llama", "scales"), ("llama", "llm-qat"), ("llava", "lora+projector")])
def test_a_run_that_has_all_its_steps_takes_no_more(
    case_of: Callable[[str, str], Case],
    family: str,
    trains: str,
    length: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case, changes = case_of(family, trains), LENGTHS[length]
    whole, stopped = case.make(), case.make()
    log = case.train(whole, tmp_path / "whole", **changes)
    stop_before_the_end(monkeypatch)
    with pytest.raises(Stopped):
        case.train(case.make(), tmp_path / "stopped", **changes)
    no_more_training(monkeypatch)
    again = case.train(stopped, tmp_path / "stopped", **changes)
    assert losses_of(again) == losses_of(log)
    assert same(stopped, whole)


def test_the_learning_rate_stays_where_the_schedule_ends(
    case_of: Callable[[str, str], Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, seen = case_of("llama", "scales"), []
    finalize = EndToEndTrainer._finalize_training

    def beyond(self: EndToEndTrainer, *args: Any) -> Any:
        for _ in range(5):
            self.lr_scheduler.step()
            seen.append(self.lr_scheduler.get_last_lr()[0])
        return finalize(self, *args)

    monkeypatch.setattr(EndToEndTrainer, "_finalize_training", beyond)
    case.train(case.make(), tmp_path, lr_floor=0.1)
    assert seen == [pytest.approx(2e-4)] * 5


def test_a_checkpoint_holds_what_is_trained_and_nothing_else(
    case_of: Callable[[str, str], Case], tmp_path: Path
) -> None:
    case = case_of("llava", "projector")
    model = case.make()
    case.train(model, tmp_path)
    numbers = sum(value.numel() for value in trained_of(model).values())
    sizes = {name: len(content) for name, content in contents(tmp_path / "checkpoint-6").items()}
    assert sizes["trained.safetensors"] < 4 * numbers + 2048
    assert sizes["optimizer-exp_avg.safetensors"] == sizes["optimizer-exp_avg_sq.safetensors"] < 4 * numbers + 2048
    assert sizes.keys() == {
        "trained.safetensors",
        "optimizer-step.safetensors",
        "optimizer-exp_avg.safetensors",
        "optimizer-exp_avg_sq.safetensors",
        "scheduler.pt",
        "rng_state.pth",
        "trainer_state.json",
        "checkpoint.json",
    }


@pytest.mark.parametrize(
    ("changes", "name", "given", "allowed"),
    [
        ({"batch_size": 2}, "samples per step", "samples per step 2", "samples per step 4"),
        ({"max_steps": 8}, "max_steps", "max_steps 8", "max_steps 6"),
    ],
)
def test_a_checkpoint_of_another_kind_of_run_is_refused_with_both_values(
    case_of: Callable[[str, str], Case],
    tmp_path: Path,
    changes: dict[str, Any],
    name: str,
    given: str,
    allowed: str,
) -> None:
    case = case_of("llama", "scales")
    case.train(case.make(), tmp_path)
    before = contents(tmp_path)
    with pytest.raises(ConfigError, match=f"checkpoint-6: {name}") as raised:
        case.train(case.make(), tmp_path, **changes)
    assert_four_lines(raised.value)
    assert raised.value.given == given
    assert allowed in raised.value.allowed
    assert contents(tmp_path) == before


def test_a_checkpoint_of_other_trained_parts_is_refused(case_of: Callable[[str, str], Case], tmp_path: Path) -> None:
    case_of("llava", "scales").train(case_of("llava", "scales").make(), tmp_path)
    other = case_of("llava", "projector")
    with pytest.raises(ConfigError, match="weight_scale and 17 more") as raised:
        other.train(other.make(), tmp_path)
    assert_four_lines(raised.value)
    assert raised.value.given == "shape none: it is not trained"
