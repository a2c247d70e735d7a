"""What is found in a folder, and what is said where something cannot be read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from eqat_mm.commands.runs import model_fingerprint
from eqat_mm.errors import CheckpointError
from eqat_mm.report import Found, find
from eqat_mm.report.found import number
from eqat_mm.report.ladder import rungs
from eqat_mm.runtime.sealed import read_sealed
from tests.tiny_model import Tiny


def test_runs_come_as_they_were_started(found: Found) -> None:
    assert [(stage.name, stage.title) for stage in found.stages] == [
        ("rtn", "round-to-nearest"),
        ("block-ap", "Block-AP"),
        ("e2e-qp", "Block-AP + E2E-QP"),
    ]
    assert all(stage.finished for stage in found.stages)
    assert found.unread == []


def test_rows_have_what_was_evaluated_and_the_command_for_what_was_not(found: Found, tiny: Tiny) -> None:
    full, rounded, fitted, tuned = rungs(found, {"rtn": 2.5, "block-ap": 2.5, "e2e-qp": 2.5})
    assert (full.title, full.kl, full.agreement) == ("full precision", pytest.approx(0, abs=1e-6), 1.0)
    assert fitted.kl is not None
    assert fitted.kl > 0
    assert fitted.text == full.text
    assert fitted.missing is None
    assert (rounded.kl, tuned.kl) == (None, None)
    assert str(found.root / "e2e-qp" / "model") in str(tuned.missing)
    assert f"--reference {tiny.folder}" in str(tuned.missing)
    assert tuned.seconds == found.stages[-1].record["seconds"] > 0


def test_a_run_alone_has_its_evaluation_from_beside_it(root: Path) -> None:
    found = find(root / "block-ap", model_fingerprint)
    assert [stage.name for stage in found.stages] == ["block-ap"]
    full, fitted = rungs(found, {})
    assert full.title == "full precision"
    assert fitted.perplexity is not None


def test_a_run_may_be_named_by_a_dot(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root / "block-ap")
    for spelled in (".", "../block-ap", "../block-ap/"):
        found = find(Path(spelled), model_fingerprint)
        assert [(row.title, row.name) for row in rungs(found, {})] == [("full precision", ""), ("Block-AP", "block-ap")]


def test_an_evaluation_of_another_checkpoint_does_not_count(root: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(root, tmp_path / "copy")
    shutil.rmtree(copy / "block-ap" / "model")
    shutil.copytree(copy / "rtn" / "model", copy / "block-ap" / "model")
    rows = {row.name: row for row in rungs(find(copy, model_fingerprint), {})}
    assert rows["block-ap"].perplexity is None
    assert rows["block-ap"].missing is not None


def test_plan_and_peak_memory_are_in_the_record(found: Found) -> None:
    for stage in found.stages[1:]:
        plan = stage.record["plan"]
        assert plan.keys() == {"gpu", "ram", "disk", "written", "seconds"}
        assert plan["ram"] > 0
        assert stage.record["peak_ram"] > 2**20
        assert stage.manifest is not None
        assert not {"plan", "peak_ram"} & stage.manifest.provenance[-1].keys()


def test_an_unfinished_run_is_said_to_be_one(root: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(root, tmp_path / "copy")
    (copy / "e2e-qp" / "model" / "eqat.json").unlink()
    stage = find(copy, model_fingerprint).stages[-1]
    assert (stage.finished, stage.manifest, stage.title) == (False, None, "E2E-QP")
    row = rungs(find(copy, model_fingerprint), {})[-1]
    assert (row.title, row.missing) == ("E2E-QP, not finished", None)


def test_what_cannot_be_read_is_named_and_the_rest_is_kept(root: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(root, tmp_path / "copy")
    (copy / "rtn" / "run.json").write_text("{", encoding="utf-8")
    (copy / "eval" / "full.json").write_text("[" * 10_000, encoding="utf-8")
    with (copy / "block-ap" / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"block": 2, "loss')
    found = find(copy, model_fingerprint)
    assert [stage.name for stage in found.stages] == ["block-ap", "e2e-qp"]
    assert [len(stage.metrics) for stage in found.stages] == [2, 7]
    assert {Path(path).name for path, _ in found.unread} == {"run.json", "full.json", "metrics.jsonl"}


@pytest.mark.parametrize("name", ["nothing", "empty"])
def test_a_folder_without_a_run_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"run\.json|no such folder"):
        find(tmp_path / name, model_fingerprint)


def test_a_record_is_read_as_it_is_sealed(root: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(root / "rtn", tmp_path / "rtn")
    record = read_sealed(copy / "run.json") | {"seconds": 1e9}
    (copy / "run.json").write_text(json.dumps(record), encoding="utf-8")
    with pytest.raises(CheckpointError):
        find(copy, model_fingerprint)


@pytest.mark.parametrize(
    ("value", "expected"), [(3, 3.0), (0.5, 0.5), (True, None), ("7", None), (float("nan"), None), ([], None)]
)
def test_only_finite_numbers_count(value: object, expected: float | None) -> None:
    assert number(value) == expected
