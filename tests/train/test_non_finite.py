"""Numbers that are not finite in the end-to-end trainers: steps skipped, said and bounded; what is broken is named."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from eqat_mm.errors import TrainingError
from eqat_mm.train import end_to_end
from eqat_mm.train.checkpoints import checkpoints_in, read_trained
from eqat_mm.train.end_to_end import EndToEndTrainer
from eqat_mm.train.non_finite import IN_A_ROW, IN_TOTAL, Count, first_non_finite
from tests.checkpoint.files import assert_four_lines, contents
from tests.train.cases import Case, cases_in, losses_of, trained_of
from tests.train.problems import same
from tests.train.stopping import Stopped, stop_at_step

CASES = [("llama", "scales"), ("llama", "llm-qat"), ("llava", "scales+projector")]


@pytest.fixture(scope="module")
def case_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Case]:
    folder = tmp_path_factory.mktemp("cases")
    return lambda family, trains: cases_in(folder, family, trains)


@pytest.fixture
def case(case_of: Callable[[str, str], Case]) -> Case:
    return case_of("llama", "scales")


def break_losses(monkeypatch: pytest.MonkeyPatch, steps: set[int], by: float = math.nan) -> None:
    """Let the losses of some forwards, numbered from 1, be multiplied."""
    real, seen = end_to_end.cross_entropy, [0]

    def loss(*args: Any) -> Tensor:
        seen[0] += 1
        return real(*args) * (by if seen[0] in steps else 1.0)

    monkeypatch.setattr(end_to_end, "cross_entropy", loss)


def states(monkeypatch: pytest.MonkeyPatch) -> list[tuple[dict[str, Tensor], dict[str, Any]]]:
    """Return weights and optimizer state behind each step, as they come."""
    seen: list[tuple[dict[str, Tensor], dict[str, Any]]] = []
    real = EndToEndTrainer._maybe_log_save_evaluate

    def look(self: EndToEndTrainer, *args: Any, **kwargs: Any) -> Any:
        kept = [{name: value.clone() for name, value in state.items()} for state in self.optimizer.state.values()]
        seen.append((trained_of(self.model), {"state": kept}))  # type: ignore[arg-type]
        return real(self, *args, **kwargs)

    monkeypatch.setattr(EndToEndTrainer, "_maybe_log_save_evaluate", look)
    return seen


@pytest.mark.parametrize("by", [math.nan, math.inf])
@pytest.mark.parametrize(("family", "trains"), CASES)
def test_a_step_that_is_not_finite_changes_nothing(
    case_of: Callable[[str, str], Case],
    family: str,
    trains: str,
    by: float,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    case = case_of(family, trains)
    break_losses(monkeypatch, {3}, by)
    seen = states(monkeypatch)
    log = case.train(case.make(), tmp_path)
    (before, moments), (after, moments_after) = seen[1], seen[2]
    assert all(torch.equal(after[name], before[name]) for name in before)
    for old, new in zip(moments["state"], moments_after["state"], strict=True):
        assert old.keys() == new.keys() == {"step", "exp_avg", "exp_avg_sq"}
        assert all(torch.equal(old[name], new[name]) for name in old)
    assert any(not torch.equal(seen[3][0][name], before[name]) for name in before)
    said = capsys.readouterr().out
    assert said.count("optimizer step 3 is skipped: its loss or gradient is not finite") == 1
    assert "1 steps were skipped" in said
    assert [record.get("skipped") for record in log if "loss" in record] == [None, None, 1, None, None, None]


def test_losses_of_a_log_line_are_those_of_the_steps_that_were_taken(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    each = losses_of(case.train(case.make(), tmp_path / "each", learning_rate=1e-9))
    break_losses(monkeypatch, {2, 4, 5, 6})
    log = case.train(case.make(), tmp_path / "some", learning_rate=1e-9, logging_steps=3)
    first, second, last = (record for record in log if "loss" in record or "train_loss" in record)
    assert first["loss"] == pytest.approx((each[0] + each[2]) / 2, rel=1e-4)
    assert first["skipped"] == 1
    assert (second["loss"], second["grad_norm"], second["skipped"]) == (None, None, 3)
    assert last["train_loss"] == pytest.approx((each[0] + each[2]) / 2, rel=1e-4)
    json.dumps(log, allow_nan=False)


def test_one_bad_forward_of_several_skips_their_step_and_no_other(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"batch_size": 2, "accumulation": 2}
    good = losses_of(case.train(case.make(), tmp_path / "good", **changes))
    break_losses(monkeypatch, {6})
    log = case.train(case.make(), tmp_path / "bad", **changes)
    assert losses_of(log)[:2] == good[:2]
    assert losses_of(log)[2] is None
    assert all(math.isfinite(loss) for loss in losses_of(log)[3:])


def test_a_finite_gradient_of_a_loss_that_is_not_is_no_step(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Infinite(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, loss: Tensor) -> Tensor:
            return loss + math.inf

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return grad

    real = end_to_end.cross_entropy
    monkeypatch.setattr(end_to_end, "cross_entropy", lambda *args: Infinite.apply(real(*args)))
    with pytest.raises(TrainingError, match="6 of 6 steps"):
        case.train(case.make(), tmp_path)


@pytest.mark.parametrize(("family", "trains"), CASES)
def test_too_many_steps_end_training_at_a_finite_checkpoint(
    case_of: Callable[[str, str], Case],
    family: str,
    trains: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case = case_of(family, trains)
    break_losses(monkeypatch, set(range(4, 100)))
    with pytest.raises(TrainingError) as raised:
        case.train(case.make(), tmp_path, max_steps=60, save_steps=1)
    error = raised.value
    assert_four_lines(error)
    assert f"optimizer step {3 + IN_A_ROW + 1}, gradient of model." in error.where
    assert f"{IN_A_ROW + 1} steps in a row" in error.given
    newest = checkpoints_in(tmp_path)[0]
    assert f"{newest} is finite and is kept" in error.allowed
    assert "--learning_rate (now 0.002)" in error.do
    assert "the same command tries again from there" in error.do
    assert all(value.isfinite().all() for value in read_trained(newest).values())


def test_steps_in_total_are_bounded_too() -> None:
    count = Count()
    for _ in range(IN_TOTAL):
        count.add(finite=True)
        count.add(finite=False)
        assert not count.too_many
    count.add(finite=False)
    assert count.too_many


def test_a_tensor_that_is_not_finite_is_named_before_anything_is_trained(case: Case, tmp_path: Path) -> None:
    for name in ("model.layers.1.mlp.down_proj.weight_scale", "model.norm.weight"):
        model = case.make()
        with torch.no_grad():
            model.get_parameter(name).view(-1)[3] = math.nan
        with pytest.raises(TrainingError) as raised:
            case.train(model, tmp_path / name)
        assert_four_lines(raised.value)
        assert raised.value.where == f"E2E-QP, optimizer step 1: {name}"
        assert "no learning rate" in raised.value.allowed
        assert not contents(tmp_path / name)


def test_a_frozen_tensor_is_named_wherever_it_shows(case: Case, tmp_path: Path) -> None:
    """A word that only a later sample holds."""
    model = case.make()
    embedding: nn.Embedding = model.get_input_embeddings()  # type: ignore[assignment]
    forwards = [0]

    def break_it(*args: Any) -> None:
        forwards[0] += 1
        if forwards[0] == 3:
            embedding.weight.data[2:] = math.nan

    model.register_forward_pre_hook(break_it)
    with pytest.raises(TrainingError, match=r"optimizer step 3: model\.embed_tokens\.weight"):
        case.train(model, tmp_path)


def test_samples_are_named_where_the_model_is_finite(
    case_of: Callable[[str, str], Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = case_of("llava", "scales")
    read: list[int] = []
    real = end_to_end.cross_entropy
    monkeypatch.setattr(end_to_end, "cross_entropy", lambda *args: real(*args) * math.nan)
    from eqat_mm.data.image_text.samples import ImageTextDataset

    get = ImageTextDataset.__getitem__
    monkeypatch.setattr(ImageTextDataset, "__getitem__", lambda self, i: read.append(i) or get(self, i))
    with pytest.raises(TrainingError) as raised:
        case.train(case.make(), tmp_path, max_steps=1)
    assert_four_lines(raised.value)
    step = sorted(read[1:5])  # behind the one that says what a blank image looks like
    assert raised.value.where == (f"E2E-QP, optimizer step 1: samples {', '.join(map(str, step))} of the training data")
    assert "no learning rate helps" in raised.value.do


def test_weights_that_overflow_are_not_saved_and_are_named(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step with finite gradients that is too large."""
    real = EndToEndTrainer._get_grad_norm

    def overflow(self: EndToEndTrainer, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 3:
            self.optimizer.param_groups[0]["lr"] = math.inf
        return real(self, *args, **kwargs)

    monkeypatch.setattr(EndToEndTrainer, "_get_grad_norm", overflow)
    with pytest.raises(TrainingError, match=r"optimizer step 4, .*layers\.0.*weight_scale") as raised:
        case.train(case.make(), tmp_path)
    assert_four_lines(raised.value)
    assert [path.name for path in checkpoints_in(tmp_path)] == ["checkpoint-2"]
    assert f"{tmp_path / 'checkpoint-2'} is finite" in raised.value.allowed


def test_a_run_without_bad_steps_is_what_it_was(case: Case, tmp_path: Path) -> None:
    left, right = case.make(), case.make()
    log = case.train(left, tmp_path / "left")
    case.train(right, tmp_path / "right")
    assert same(left, right)
    assert not any("skipped" in record for record in log)


def test_the_first_tensor_that_is_not_finite_is_named() -> None:
    good, bad = torch.ones(2), torch.tensor([1.0, math.inf])
    assert first_non_finite([("a", good), ("b", torch.ones(2, dtype=torch.int32)), ("c", good)]) is None
    assert first_non_finite([("a", good), ("b", bad), ("c", bad)]) == "b"
    assert first_non_finite([]) is None


def test_a_continued_run_that_diverges_is_not_blamed_on_its_samples(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"max_steps": 60, "save_steps": 2}
    stop_at_step(monkeypatch, 5)
    with pytest.raises(Stopped):
        case.train(case.make(), tmp_path, **changes)
    break_losses(monkeypatch, set(range(100)))
    with pytest.raises(TrainingError, match=f"optimizer step {4 + IN_A_ROW + 1}, gradient of") as raised:
        case.train(case.make(), tmp_path, **changes)
    assert "--learning_rate" in raised.value.do
