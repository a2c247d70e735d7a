"""Training checkpoints that a crash or a disk damaged: never loaded in part, never silent, never the end of a run."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from eqat_mm.errors import ResourceError
from eqat_mm.runtime.files import read_json, write_json
from eqat_mm.train import checkpoints, resumable
from eqat_mm.train.checkpoints import RECORD, checkpoints_in, written
from tests.checkpoint.files import assert_four_lines
from tests.train.cases import Case, cases_in, trained_of
from tests.train.stopping import Stopped, stop_at_step

FILES = (
    "trained.safetensors",
    "optimizer-step.safetensors",
    "optimizer-exp_avg.safetensors",
    "optimizer-exp_avg_sq.safetensors",
    "scheduler.pt",
    "rng_state.pth",
    "trainer_state.json",
    RECORD,
)


def truncate(path: Path, other: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path, other: Path) -> None:
    path.write_bytes(b"")


def flip(path: Path, other: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def remove(path: Path, other: Path) -> None:
    path.unlink()


def swap(path: Path, other: Path) -> None:
    shutil.copy(other, path)


DAMAGES = [
    (name, damage)
    for name in FILES
    for damage in (truncate, empty, flip, remove, swap)
    if (name, damage) != ("rng_state.pth", swap)  # nothing is random here: both hold the same bytes
]


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return cases_in(tmp_path_factory.mktemp("cases"), "llama", "scales")


@pytest.fixture(scope="module")
def whole(case: Case, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """What an undisturbed run ends with."""
    model = case.make()
    case.train(model, tmp_path_factory.mktemp("whole"))
    return trained_of(model)


@pytest.fixture(scope="module")
def stopped(case: Case, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run stopped in its fifth step, with checkpoints 2 and 4; not to be altered."""
    folder = tmp_path_factory.mktemp("stopped")
    with pytest.MonkeyPatch.context() as patch:
        stop_at_step(patch, 5)
        with pytest.raises(Stopped):
            case.train(case.make(), folder)
    return folder


@pytest.fixture
def run(stopped: Path, tmp_path: Path) -> Path:
    """A copy of it, to be altered."""
    shutil.copytree(stopped, tmp_path / "run")
    return tmp_path / "run"


def steps_to_the_end(case: Case, run: Path, whole: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch) -> int:
    """Continue a run, which must end as the undisturbed one; return the steps it took."""
    steps, model = stop_at_step(monkeypatch, 0), case.make()
    case.train(model, run)
    assert all(torch.equal(value, whole[name]) for name, value in trained_of(model).items())
    return len(steps)


@pytest.mark.parametrize(("name", "damage"), DAMAGES)
def test_a_damaged_checkpoint_is_skipped_for_the_one_before(
    case: Case,
    run: Path,
    whole: dict[str, Tensor],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    damage: Callable[[Path, Path], None],
) -> None:
    damage(run / "checkpoint-4" / name, run / "checkpoint-2" / name)
    assert steps_to_the_end(case, run, whole, monkeypatch) == 4
    said = capsys.readouterr().out
    assert f"{run / 'checkpoint-4'} is skipped: " in said
    assert f"continuing from {run / 'checkpoint-2'}" in said
    assert [path.name for path in checkpoints_in(run)] == ["checkpoint-6", "checkpoint-4"]


@pytest.mark.parametrize("name", ["step", "total", "run", "trained", "files"])
def test_an_edited_record_is_damage(
    case: Case, run: Path, whole: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    record = read_json(run / "checkpoint-4" / RECORD)
    write_json(run / "checkpoint-4" / RECORD, record | {name: 4 if name == "total" else type(record[name])()})
    assert steps_to_the_end(case, run, whole, monkeypatch) == 4


@pytest.mark.parametrize("content", ["[]", "{}", "null", "4", '{"sha256": 1}'])
def test_a_record_of_another_form_is_damage(
    case: Case, run: Path, whole: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch, content: str
) -> None:
    (run / "checkpoint-4" / RECORD).write_text(content, encoding="utf-8")
    assert steps_to_the_end(case, run, whole, monkeypatch) == 4


def test_a_checkpoint_under_the_number_of_another_is_damage(
    case: Case, run: Path, whole: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    (run / "checkpoint-4").rename(run / "checkpoint-5")
    assert steps_to_the_end(case, run, whole, monkeypatch) == 4
    assert [path.name for path in checkpoints_in(run)] == ["checkpoint-6", "checkpoint-4"]


def test_without_a_whole_checkpoint_a_run_begins_again_and_says_so(
    case: Case,
    run: Path,
    whole: dict[str, Tensor],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for path in checkpoints_in(run):
        (path / RECORD).unlink()
    assert steps_to_the_end(case, run, whole, monkeypatch) == 6
    said = capsys.readouterr().out
    assert said.count("is skipped: no checkpoint.json in it, so it was not finished") == 2
    assert f"no checkpoint in {run} is whole: training starts from the beginning" in said


@pytest.mark.parametrize("at", ["save_file", "complete"])
def test_a_save_that_was_stopped_is_no_checkpoint_and_leaves_nothing(
    case: Case, whole: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    real = getattr(resumable, at)

    def stop(*args: object) -> None:
        if list(tmp_path.glob("checkpoint-2")):
            raise Stopped
        real(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resumable, at, stop)
        with pytest.raises(Stopped):
            case.train(case.make(), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-2", "checkpoint-4.partial"}
    assert steps_to_the_end(case, tmp_path, whole, monkeypatch) == 4
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-4", "checkpoint-6"}


def test_every_file_is_on_the_disk_before_the_record_and_the_record_before_the_name(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    real, write = checkpoints.fsync, checkpoints.write_json

    def note(path: Path) -> None:
        synced.append(path.name)
        real(path)

    def record(path: Path, value: object) -> None:
        synced.append(path.name)
        write(path, value)

    monkeypatch.setattr(checkpoints, "fsync", note)
    monkeypatch.setattr(checkpoints, "write_json", record)
    case.train(case.make(), tmp_path, save_steps=100)
    assert set(synced[:-2]) == set(FILES) - {RECORD}
    assert synced[-2:] == [RECORD, tmp_path.name]


def test_a_full_disk_is_four_lines(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match="make room") as raised, written(tmp_path):
        torch.save(torch.zeros(8), tmp_path / "missing" / "file")
    assert_four_lines(raised.value)


def test_other_errors_stay_what_they_are(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="size of tensor"), written(tmp_path):
        torch.zeros(2) + torch.zeros(3)
