"""A run knows what decides it, whether it is finished, who works on it, and what is its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from eqat_mm.errors import CheckpointError, ConfigError, EqatError
from eqat_mm.runtime.files import read_json
from eqat_mm.runtime.place import Place
from eqat_mm.runtime.run import Asked, Run
from eqat_mm.runtime.sealed import read_sealed, write_sealed
from tests.checkpoint.files import assert_four_lines, contents

WANTED = Asked("work", {"bits": 2}, {"bits": 2}, {"threads": 1})
OTHER = Asked("work", {"bits": 3}, {"bits": 3}, {"threads": 1})


def place_of(folder: Path) -> Place:
    return Place.within(folder, "model/proof.json")


def work(folder: Path, asked: Asked = WANTED, stop: str | None = None, **options: Any) -> bool:
    """Do the work of a run, or stop in it; returns whether it was finished already."""
    with Run.open(place_of(folder), asked, **options) as run:
        if run.finished:
            return True
        run.begin()
        (folder / "trainer").mkdir(exist_ok=True)
        (folder / "trainer" / "step").write_text("1")
        if stop == "on the way":
            raise KeyboardInterrupt
        (folder / "model").mkdir(exist_ok=True)
        (folder / "model" / "weights").write_text(str(asked.decides))
        (folder / "model" / "proof.json").write_text("{}")
        if stop == "behind the last file":
            raise KeyboardInterrupt
        run.finish()
    return False


def stopped(folder: Path, stop: str, **options: Any) -> None:
    with pytest.raises(KeyboardInterrupt):
        work(folder, stop=stop, **options)


def refused(folder: Path, asked: Asked = WANTED, **options: Any) -> EqatError:
    """Return the error of a run that changes nothing."""
    before = contents(folder) if folder.exists() else None
    with pytest.raises(EqatError) as raised:
        work(folder, asked, **options)
    assert_four_lines(raised.value)
    assert (contents(folder) if folder.exists() else None) == before
    return raised.value


# ---- what decides it --------------------------------------------------------------------------------


def test_a_finished_run_is_not_done_again(tmp_path: Path) -> None:
    assert not work(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"run.json", "model"}
    assert work(tmp_path)


def test_what_decides_is_compared_before_and_after_it_is_finished(tmp_path: Path) -> None:
    stopped(tmp_path / "unfinished", "on the way")
    assert "an unfinished run: bits" in refused(tmp_path / "unfinished", OTHER).where
    work(tmp_path / "finished")
    error = refused(tmp_path / "finished", OTHER)
    assert "a finished run: bits" in error.where
    assert (error.given, error.allowed.split(",")[0]) == ("bits=3", "bits=2")


def test_another_environment_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stopped(tmp_path, "on the way")
    work(tmp_path, Asked("work", {"bits": 2}, {"bits": 2}, {"threads": 4}))
    assert "goes on with threads 4 (was 1)" in capsys.readouterr().out
    assert read_json(tmp_path / "run.json")["continued"][0]["environment"]["threads"] == 4


def test_a_note_of_something_else_is_replaced(tmp_path: Path) -> None:
    work(tmp_path)
    assert not work(tmp_path, OTHER, on_change="replace")
    assert (tmp_path / "model" / "weights").read_text() == "{'bits': 3}"


# ---- whether it is finished -------------------------------------------------------------------------


def test_a_run_that_was_stopped_goes_on(tmp_path: Path) -> None:
    stopped(tmp_path, "on the way")
    started = read_json(tmp_path / "run.json")["started"]
    assert not work(tmp_path)
    assert read_json(tmp_path / "run.json")["started"] == started


def test_a_run_stopped_behind_its_last_file_is_finished_and_tidy(tmp_path: Path) -> None:
    stopped(tmp_path, "behind the last file")
    (tmp_path / "model" / ".weights.0a1b.partial").touch()
    (tmp_path / ".metrics.jsonl.0a1b.partial").touch()
    assert work(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"run.json", "model"}
    assert {path.name for path in (tmp_path / "model").iterdir()} == {"weights", "proof.json"}
    assert read_json(tmp_path / "run.json")["finished"]


def test_a_product_that_was_removed_is_made_again(tmp_path: Path) -> None:
    work(tmp_path)
    (tmp_path / "model" / "proof.json").unlink()
    stopped(tmp_path, "on the way")
    assert not {"finished", "proof"} & read_json(tmp_path / "run.json").keys()
    assert not work(tmp_path)
    place = Place.beside(tmp_path / "texts.jsonl")
    with Run.open(place, WANTED) as run:
        run.begin()
        place.proof.write_text("all")
        run.finish()
    place.proof.unlink()
    with Run.open(place, WANTED, shared=True) as again:
        assert not again.finished_meanwhile()


def test_a_product_that_was_altered_is_noticed(tmp_path: Path) -> None:
    work(tmp_path)
    (tmp_path / "model" / "proof.json").write_text("{ }")
    assert "proof.json" in refused(tmp_path).where

    def damaged() -> None:
        raise CheckpointError("weights", "altered", "whole", "make them again")

    work(tmp_path / "other")
    assert refused(tmp_path / "other", check=damaged).where == "weights"


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", "null", "[" * 100_000, '{"sha256": "0"}'], ids=lambda text: text[:9] or "empty"
)
def test_a_damaged_record_is_refused(tmp_path: Path, text: str) -> None:
    stopped(tmp_path, "on the way")
    (tmp_path / "run.json").write_text(text)
    assert "run.json" in refused(tmp_path).where
    assert "run.json" in refused(tmp_path, overwrite=True).where


def test_a_record_that_was_edited_is_refused(tmp_path: Path) -> None:
    work(tmp_path)
    record = (tmp_path / "run.json").read_text()
    (tmp_path / "run.json").write_text(record.replace('"bits": 2', '"bits": 3'))
    assert "other content than was written" in refused(tmp_path, OTHER).given


def test_another_sealed_file_is_no_record(tmp_path: Path) -> None:
    stopped(tmp_path, "on the way")
    write_sealed(tmp_path / "run.json", {"records": []})
    assert "run.json" in refused(tmp_path).where


def test_seconds_add_up(tmp_path: Path) -> None:
    stopped(tmp_path, "on the way")
    record = read_sealed(tmp_path / "run.json")
    write_sealed(tmp_path / "run.json", record | {"seconds": 100.0})
    work(tmp_path)
    assert 100 < read_sealed(tmp_path / "run.json")["seconds"] < 110


# ---- what is its own --------------------------------------------------------------------------------


def test_overwrite_keeps_the_old_until_the_new_is_whole(tmp_path: Path) -> None:
    work(tmp_path)
    stopped(tmp_path, "on the way", overwrite=True)
    assert (tmp_path / ".replaced" / "model" / "weights").read_text() == "{'bits': 2}"
    stopped(tmp_path, "on the way", overwrite=True)  # it discards the unfinished one, not what that replaces
    assert (tmp_path / ".replaced" / "model" / "weights").is_file()
    work(tmp_path, OTHER, overwrite=True)
    assert {path.name for path in tmp_path.iterdir()} == {"run.json", "model"}
    assert (tmp_path / "model" / "weights").read_text() == "{'bits': 3}"


@pytest.mark.parametrize("moved", [0, 1])
@pytest.mark.parametrize("again", [WANTED, OTHER], ids=["same", "other"])
def test_a_run_stopped_while_it_sets_the_old_aside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moved: int, again: Asked
) -> None:
    work(tmp_path)
    rename, renamed = Path.rename, []

    def stop(self: Path, target: Path) -> Path:
        renamed.append(self)
        if len(renamed) > moved:
            raise KeyboardInterrupt
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", stop)
        with pytest.raises(KeyboardInterrupt):
            work(tmp_path, OTHER, overwrite=True)
    work(tmp_path, again, overwrite=again is OTHER)
    assert {path.name for path in tmp_path.iterdir()} <= {"run.json", "model", ".replaced"}
    assert (tmp_path / "model" / "weights").read_text() == str(again.decides)


def test_a_run_that_replaces_another_is_continued_without_the_flag(tmp_path: Path) -> None:
    work(tmp_path)
    stopped(tmp_path, "on the way", overwrite=True)
    work(tmp_path)
    assert not (tmp_path / ".replaced").exists()


def test_overwrite_touches_nothing_of_others(tmp_path: Path) -> None:
    work(tmp_path)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "a.tex").write_text("mine")
    (tmp_path / ".notes.partial").write_text("mine")
    work(tmp_path, OTHER, overwrite=True)
    assert (tmp_path / "thesis" / "a.tex").read_text() == "mine"
    assert (tmp_path / ".notes.partial").read_text() == "mine"


@pytest.mark.parametrize("name", ["model", "trainer", "state.json"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_what_no_run_wrote_is_refused(tmp_path: Path, name: str, overwrite: bool) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "weights").write_text("mine")
    assert name in refused(tmp_path, overwrite=overwrite).given


@pytest.mark.parametrize("inside", ["model", "model/sub/text.txt", ".replaced/model"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_an_input_inside_is_refused(tmp_path: Path, inside: str, overwrite: bool) -> None:
    work(tmp_path)
    asked = Asked("work", {}, {"bits": 2}, inputs=(tmp_path / inside,))
    assert inside in refused(tmp_path, asked, overwrite=overwrite).given
    link = tmp_path / "link"
    link.symlink_to(tmp_path / inside)
    refused(tmp_path, Asked("work", {}, {"bits": 2}, inputs=(link,)), overwrite=overwrite)


def test_an_input_beside_is_none_of_its_business(tmp_path: Path) -> None:
    (tmp_path / "text.txt").touch()
    work(tmp_path / "run", Asked("work", {}, {}, inputs=(tmp_path / "text.txt", tmp_path)))


def test_a_refused_run_leaves_no_folder(tmp_path: Path) -> None:
    def no_room() -> None:
        with Run.open(place_of(tmp_path / "a" / "b"), WANTED) as run:
            run.require_room(2**60, "everything")

    with pytest.raises(EqatError, match="everything"):
        no_room()
    assert list(tmp_path.iterdir()) == []


def test_what_was_written_counts_as_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped(tmp_path, "on the way")
    (tmp_path / "trainer" / "step").write_bytes(bytes(1000))
    monkeypatch.setattr("eqat_mm.runtime.room.shutil.disk_usage", lambda _: type("Usage", (), {"free": 500}))
    with Run.open(place_of(tmp_path), WANTED) as run:
        run.require_room(1400, "checkpoint")
        with pytest.raises(EqatError, match="of this run included"):
            run.require_room(2**24, "checkpoint")


# ---- who works on it --------------------------------------------------------------------------------

HOLD = """
import sys, time
from pathlib import Path
from eqat_mm.runtime.place import Place
from eqat_mm.runtime.run import Asked, Run
with Run.open(Place.within(Path(sys.argv[1]), "model/proof.json"), Asked("work", {}, {"bits": 2})) as run:
    run.begin()
    print("held", flush=True)
    time.sleep(60)
"""


def test_one_process_at_a_time(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        assert f"process {holder.pid} on {os.uname().nodename}" in refused(tmp_path).given
        refused(tmp_path, overwrite=True)
        holder.kill()
    assert (tmp_path / "run.lock").is_file()
    work(tmp_path)  # the lock of a dead process is taken over
    assert not (tmp_path / "run.lock").exists()


def test_locks_of_a_killed_process_are_nothing_strange(tmp_path: Path) -> None:
    place = Place.beside(tmp_path / "texts.jsonl")
    place.folder.mkdir()
    for name in ("run.lock", "parts.lock"):
        (place.folder / name).touch()
    with Run.open(place, WANTED, shared=True) as run:
        run.begin()


def test_a_shared_run_leaves_no_temporary_files(tmp_path: Path) -> None:
    place, left = Place.beside(tmp_path / "texts.jsonl"), tmp_path / ".texts.jsonl.0a1b.partial"
    left.touch()
    with Run.open(place, WANTED, shared=True) as first, Run.open(place, WANTED, shared=True) as second:
        first.begin()
        second.begin()
        assert left.exists()  # the other may be writing it
        place.proof.write_text("all")
        first.finish()
    assert {path.name for path in tmp_path.iterdir()} == {"texts.jsonl", "texts.jsonl.json"}


def test_processes_that_share_a_run(tmp_path: Path) -> None:
    file = tmp_path / "texts.jsonl"
    with (
        Run.open(Place.beside(file), WANTED, shared=True) as first,
        Run.open(Place.beside(file), WANTED, shared=True) as second,
    ):
        first.begin()
        second.begin()
        assert first.record == second.record
        with pytest.raises(ConfigError, match="is working on"), Run.open(Place.beside(file), WANTED, overwrite=True):
            pass
        assert not second.finished_meanwhile()
        file.write_text("all")
        first.finish()
        assert second.finished_meanwhile()
    assert {path.name for path in tmp_path.iterdir()} == {"texts.jsonl", "texts.jsonl.json"}
    with Run.open(Place.beside(file), WANTED) as again:
        assert again.finished
    file.write_text("cut")
    with pytest.raises(CheckpointError, match=r"texts\.jsonl"), Run.open(Place.beside(file), WANTED):
        pass


def test_the_others_of_a_job_read_what_the_first_has_begun(tmp_path: Path) -> None:
    with Run.open(place_of(tmp_path), WANTED) as first:
        first.begin()
        with Run.open(place_of(tmp_path), WANTED, first=False) as other:
            assert other.record == first.record
            assert not other.finished
