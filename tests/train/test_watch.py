"""What is said of a run while it goes: on the console, in metrics.jsonl, to a dashboard; and how it is judged."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from eqat_mm.runtime.reporting import Reporter
from eqat_mm.train.checkpoints import read_trained
from eqat_mm.train.end_to_end import WindowDataset
from eqat_mm.train.held_out import HeldOut
from eqat_mm.train.watch import Watch, line_of
from tests.tolerances import assert_close
from tests.train.cases import Case, cases_in, losses_of, trained_of, windows
from tests.train.problems import CPU, mean_loss, same
from tests.train.stopping import Stopped, stop_at_step

LINE = re.compile(
    r"step (\d)/6 +\d+\.\d%  loss \d+\.\d{4}  lr \d\.\d\de-0\d  [\d,]+ tok/s  \d+\.\d\d GiB  eta (\d+s|\dm\d\ds)"
)


class Kept(Reporter):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.told: list[tuple[int, Mapping[str, Any]]] = []

    def add(self, step: int, numbers: Mapping[str, Any]) -> None:
        self.told.append((step, numbers))


@pytest.fixture(scope="module")
def case_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Case]:
    folder = tmp_path_factory.mktemp("cases")
    return lambda family, trains: cases_in(folder, family, trains)


def records_in(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def held_out(every: int = 2) -> HeldOut:
    return HeldOut.of(WindowDataset(windows()[:5]), None, every, batch_size=2)


def test_every_line_of_the_log_is_a_line_of_the_console_of_the_file_and_of_the_dashboard(
    case_of: Callable[[str, str], Case], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case, reporter = case_of("llama", "scales"), Kept()
    log = case.train(case.make(), tmp_path / "trainer", watch=Watch(tmp_path / "metrics.jsonl", reporter))
    steps = [LINE.fullmatch(line) for line in capsys.readouterr().out.splitlines()]
    assert [match[1] for match in steps if match] == ["1", "2", "3", "4", "5", "6"]
    assert records_in(tmp_path / "metrics.jsonl") == log
    assert [step for step, _ in reporter.told] == [1, 2, 3, 4, 5, 6, 6]
    assert [numbers for _, numbers in reporter.told] == log
    for record in log[:-1]:
        assert record["tokens_per_second"] > 0
        assert record["peak_bytes"] > 2**20
        assert record["eta_seconds"] >= 0
    assert log[5]["eta_seconds"] == 0


def test_the_file_is_there_while_the_run_goes_and_a_continued_one_has_each_step_once(
    case_of: Callable[[str, str], Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, watch = case_of("llama", "scales"), Watch(tmp_path / "metrics.jsonl")
    stop_at_step(monkeypatch, 4)
    with pytest.raises(Stopped):
        case.train(case.make(), tmp_path / "trainer", watch=watch)
    assert [record["step"] for record in records_in(tmp_path / "metrics.jsonl")] == [1, 2, 3]
    case.train(case.make(), tmp_path / "trainer", watch=watch)  # from the checkpoint of step 2
    assert [record["step"] for record in records_in(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6, 6]


def test_skipped_steps_are_in_the_line() -> None:
    record = {"step": 12, "loss": None, "learning_rate": 2e-5, "skipped": 2, "tokens_per_second": 1234.5}
    assert line_of(record | {"peak_bytes": 3 << 30, "eta_seconds": 3700}, 2078) == (
        "step   12/2078   0.6%  loss -  lr 2.00e-05  2 skipped  1,234 tok/s  3.00 GiB  eta 1h01m"
    )


def test_a_run_is_judged_on_what_it_does_not_learn_from(
    case_of: Callable[[str, str], Case], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case, judge = case_of("llama", "scales"), held_out()
    judge.record(case.make(), CPU, "float32")
    start, model = case.make(), case.make()
    log = case.train(model, tmp_path, held_out=judge)
    judged = [record for record in log if "held_out_loss" in record]
    assert [record["step"] for record in judged] == [0, 2, 4, 6]
    assert judged[0]["held_out_loss"] == pytest.approx(mean_loss(start, windows()[:5], None), rel=1e-5)
    assert judged[0]["held_out_kl"] == pytest.approx(0, abs=1e-5)  # it is its own teacher
    assert judged[-1]["held_out_loss"] == pytest.approx(mean_loss(model, windows()[:5], None), rel=1e-4)
    assert judged[-1]["held_out_kl"] == pytest.approx(mean_loss(model, windows()[:5], start), rel=1e-2)
    assert capsys.readouterr().out.count("held out  loss") == 4


def test_judging_changes_nothing_of_the_training(case_of: Callable[[str, str], Case], tmp_path: Path) -> None:
    case = case_of("llava", "scales+projector")
    plain, judged = case.make(), case.make()
    log = case.train(plain, tmp_path / "plain")
    assert losses_of(case.train(judged, tmp_path / "judged", held_out=held_out())) == losses_of(log)
    assert same(plain, judged)


def test_processes_share_what_is_held_out_and_all_have_as_many_batches() -> None:
    samples = [{"input_ids": row, "labels": row} for row in windows()[:5]]
    shares = [HeldOut.of(samples, None, 1, batch_size=2, rank=rank, world=2) for rank in range(2)]
    assert [share.batches for share in shares] == [[[0, 1], [4]], [[2, 3], [-1, -2]]]
    whole = HeldOut.of(samples, None, 1, batch_size=2)

    def predict(batch: dict[str, torch.Tensor], columns: torch.Tensor) -> torch.Tensor:
        logits = torch.nn.functional.one_hot(batch["input_ids"] % 7, 97).float()
        return logits[:, columns]

    expected = whole.sums(predict, CPU)
    assert_close(sum(share.sums(predict, CPU) for share in shares), expected, "model")  # type: ignore[arg-type]
    assert expected[2] == 5 * 15


@pytest.mark.parametrize("stopped_at", [0, 5])
def test_the_best_step_is_kept(
    case_of: Callable[[str, str], Case],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    stopped_at: int,
) -> None:
    """The losses that are found say which: the third look, at step 4."""
    case, judge = case_of("llama", "scales"), held_out()
    last = case.make()
    case.train(last, tmp_path / "whole")
    at_four = read_trained(tmp_path / "whole" / "checkpoint-4")
    found = iter([5.0, 4.0, 1.0, 2.0, 2.0])
    monkeypatch.setattr(HeldOut, "sums", lambda *_: torch.tensor([next(found), 0.0, 1.0]))
    if stopped_at:
        with pytest.MonkeyPatch.context() as patch:
            stop_at_step(patch, stopped_at)
            with pytest.raises(Stopped):
                case.train(case.make(), tmp_path / "run", held_out=judge, keep_best=True)
    model = case.make()
    case.train(model, tmp_path / "run", held_out=judge, keep_best=True)
    assert "what is kept is of step 4, held-out loss 1.0000" in capsys.readouterr().out
    kept = trained_of(model)
    assert kept.keys() == at_four.keys()
    assert not same(model, last)
    for name, value in at_four.items():
        assert torch.equal(kept[name], value.to(torch.bfloat16).float())  # as step sizes are stored
