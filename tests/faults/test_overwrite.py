"""Nothing of a user is removed, and nothing of a run before something whole is in its place."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from eqat_mm.checkpoint.verify import verify_checkpoint
from eqat_mm.errors import CheckpointError
from tests.checkpoint.files import contents
from tests.commands.jobs import rtn_job
from tests.faults.cases import BLOCK_AP, E2E_QP, GENERATE_DATA, LLM_QAT, RTN, Case, words_of
from tests.faults.conftest import POINTS, Bench, Tally
from tests.faults.test_kills import KILLED, names, spread
from tests.faults.warm import Fault
from tests.tiny_model import save_tiny

ANEW = "--overwrite=true"


@pytest.mark.parametrize("inside", ["model", "model/source", "streams", ".replaced/model"])
def test_a_source_inside_the_output_stays(bench: Bench, tally: Tally, inside: str) -> None:
    folder = bench.new() / "run"
    source = save_tiny(folder.parent)
    (folder / inside).parent.mkdir(parents=True)
    source.folder.rename(folder / inside)
    before = contents(folder)
    for more in ([], [ANEW]):
        words = words_of("rtn", replace(rtn_job(source, folder), model=str(folder / inside)))
        ended = bench.warm.run([*words, *more])
        tally("--output or --overwrite on what is no run's", 1, [] if ended.four_lines else [ended.err])
        assert contents(folder) == before


def test_a_home_directory_stays(bench: Bench, tally: Tally) -> None:
    home = bench.new() / "run"
    for name in ("model/thesis.tex", "trainer/plan.txt", "streams/film.mkv", "notes.txt", ".ssh/key", "photos/a.png"):
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_text("mine")
    before = contents(home)
    ended = bench.run(RTN, home.parent, None, ANEW)
    wrong = [] if ended.four_lines and contents(home) == before else [ended.err]
    tally("--output or --overwrite on what is no run's", 1, wrong)


def test_files_of_others_stay(bench: Bench, tally: Tally) -> None:
    folder = bench.new()
    assert bench.run(RTN, folder).status == 0
    (folder / "run" / "photos").mkdir()
    (folder / "run" / "photos" / "a.png").write_text("mine")
    assert bench.run(RTN, folder, None, ANEW).status == 0
    assert (folder / "run" / "photos" / "a.png").read_text() == "mine"
    unlike = [name for name in bench.unlike(RTN, folder) if "photos" not in name]
    tally("--output or --overwrite on what is no run's", 1, unlike)


def whole_one(case: Case, folder: Path) -> list[str]:
    """Nothing, if a finished product lies there, old or new."""
    if case is GENERATE_DATA:
        places = [folder / "texts.jsonl", folder / ".texts.jsonl.parts" / ".replaced" / "texts.jsonl"]
        return [] if any(path.is_file() and path.read_text().count("\n") == 6 for path in places) else ["no whole file"]
    missing = []
    for model in (folder / "run" / "model", folder / "run" / ".replaced" / "model"):
        try:
            verify_checkpoint(model)
        except CheckpointError as error:
            missing.append(str(error))
        else:
            return []
    return missing


def killed_while_it_replaces(bench: Bench, case: Case, points: int) -> tuple[int, list[str]]:
    """Kill a command that replaces a finished run; something whole is there always, and the command goes on."""
    folder = bench.new()
    assert bench.run(case, folder).status == 0
    operations = bench.run(case, folder, None, ANEW).operations
    kills, failures = 0, []
    for operation in spread(operations, points, 0.1):
        kills += bench.run(case, folder, Fault(before_operation=operation), ANEW).status == KILLED
        wrong = whole_one(case, folder)
        ended = bench.run(case, folder, None, ANEW)
        wrong += [ended.err] if ended.status else bench.unlike(case, folder)
        failures += [f"{case.name}, killed before operation {operation}: {each}" for each in wrong[:1]]
    return kills, failures


def test_killed_while_it_replaces(bench: Bench, tally: Tally) -> None:
    tally("SIGKILL of a run that replaces another", *killed_while_it_replaces(bench, RTN, 3))


@pytest.mark.faults
@pytest.mark.parametrize("case", [RTN, BLOCK_AP["ram", "files"], E2E_QP, LLM_QAT, GENERATE_DATA], ids=names)
def test_killed_anywhere_while_it_replaces(bench: Bench, tally: Tally, case: Case) -> None:
    tally("SIGKILL of a run that replaces another", *killed_while_it_replaces(bench, case, POINTS // 2))


@pytest.mark.faults
def test_killed_while_the_old_is_set_aside(bench: Bench, tally: Tally) -> None:
    kills, failures = 0, []
    for operation in range(1, 14):  # from the lock to the new record
        folder = bench.new()
        assert bench.run(RTN, folder).status == 0
        kills += bench.run(RTN, folder, Fault(before_operation=operation), ANEW).status == KILLED
        wrong = whole_one(RTN, folder) + bench.differences(RTN, folder)  # without the flag: the settings are the same
        failures += [f"killed before operation {operation}: {each}" for each in wrong[:1]]
    tally("SIGKILL of a run that replaces another", kills, failures)
