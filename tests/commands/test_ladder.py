"""The ladder of stages on the tiny model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from eqat_mm.checkpoint.verify import verify_checkpoint
from eqat_mm.commands.tables import ladder as module
from eqat_mm.commands.tables.ladder import LadderJob, ladder
from eqat_mm.commands.tables.rungs import table
from eqat_mm.commands.verbs import quantize, tune
from eqat_mm.commands.verbs.quantize import block_ap
from eqat_mm.errors import ConfigError
from eqat_mm.runtime.files import read_json
from tests.checkpoint.files import contents
from tests.commands.jobs import SPEC, block_ap_job, e2e_qp_job
from tests.tiny_model import Tiny

STAGES = ["full precision", "round-to-nearest", "E2E-QP only", "Block-AP", "Block-AP + E2E-QP"]
ROW = {"stage", "perplexity", "kl", "top1_agreement", "bits_per_weight", "seconds"}
FOLDERS = {"rtn": "round-to-nearest", "e2e-qp-only": "e2e-qp", "block-ap": "block-ap", "e2e-qp": "e2e-qp"}


def job_of(tiny: Tiny, output: Path) -> LadderJob:
    return LadderJob(
        block_ap=block_ap_job(tiny, None),
        e2e_qp=e2e_qp_job(tiny, None, None),
        e2e_qp_only=e2e_qp_job(tiny, None, None, max_steps=3),
        data=tiny.windows(4, held_out=True),
        precision="float32",
        output=output,
    )


@pytest.fixture(scope="module")
def climbed(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """Folder and rows of a whole ladder; not to be altered."""
    folder = tmp_path_factory.mktemp("ladder")
    return folder, ladder(job_of(tiny, folder))


def never(*_: Any, **__: Any) -> None:
    raise AssertionError("a finished rung was made again")


def test_results_have_one_row_per_rung(tiny: Tiny, climbed: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, rows = climbed
    results = read_json(folder / "results.json")
    assert results["model"] == str(tiny.folder)
    assert (results["bits"], results["group_size"]) == (SPEC.bits, SPEC.group_size)
    assert results["tokens"] == 4 * 15
    assert results["rows"] == rows
    assert [row["stage"] for row in rows] == STAGES
    assert all(row.keys() == ROW for row in rows)


def test_rows_say_how_far_each_rung_is_from_full_precision(climbed: tuple[Path, list[dict[str, Any]]]) -> None:
    full, rounded, tuned, fitted, both = climbed[1]
    assert (full["kl"], full["top1_agreement"], full["bits_per_weight"]) == (pytest.approx(0, abs=1e-6), 1.0, None)
    assert full["seconds"] == 0
    assert all(0 < row["kl"] < rounded["kl"] for row in (tuned, fitted, both))
    assert both["kl"] < fitted["kl"]
    bits = SPEC.bits_per_weight(64)
    assert [row["bits_per_weight"] for row in (rounded, tuned, fitted, both)] == pytest.approx([bits] * 4)


def test_texts_of_another_kind_are_columns(
    tiny: Tiny, climbed: tuple[Path, list[dict[str, Any]]], tmp_path: Path
) -> None:
    (tmp_path / "other.txt").write_text("w90 w91 w92 w93 " * 40, "utf-8")
    rungs = module._rungs(replace(job_of(tiny, tmp_path), beside=(str(tmp_path / "other.txt"),)))
    rungs.add("full precision", lambda: tiny.folder)
    rungs.add("round-to-nearest", lambda: climbed[0] / "rtn" / "model")
    full, rounded = ({name: row[name] for name in ROW - {"stage", "seconds"}} for row in rungs.rows)
    assert full == {name: climbed[1][0][name] for name in full}
    (text,) = rungs.rows[1]["beside"]
    assert text == str(tmp_path / "other.txt")
    assert rungs.rows[0]["beside"][text]["kl"] == pytest.approx(0, abs=1e-6)
    other = rungs.rows[1]["beside"][text]
    assert other["kl"] > 0
    assert other["perplexity"] != rounded["perplexity"]
    lines = table(rungs.rows).splitlines()
    assert lines[0].endswith(text)
    assert lines[2].endswith(f"{other['perplexity']:,.2f} / {other['kl']:.4f}")


def test_every_rung_leaves_a_checkpoint(climbed: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, _ = climbed
    (teacher,) = folder.glob("teacher-*.bin")  # for both runs of E2E-QP
    assert {path.name for path in folder.iterdir()} == {*FOLDERS, "eval", "results.json", teacher.name}
    for name, stage in FOLDERS.items():
        assert verify_checkpoint(folder / name / "model").stage == stage
    commands = [record["command"] for record in verify_checkpoint(folder / "e2e-qp" / "model").provenance]
    assert commands == ["block-ap", "e2e-qp"]


def test_climbing_again_makes_nothing_anew(
    tiny: Tiny, climbed: tuple[Path, list[dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, rows = climbed
    for place, name in ((quantize, "run_rtn"), (quantize, "run_block_ap"), (tune, "run_e2e_qp")):
        monkeypatch.setattr(place, name, never)
    before = {name: contents(folder / name) for name in FOLDERS}
    assert ladder(job_of(tiny, folder)) == rows
    assert {name: contents(folder / name) for name in FOLDERS} == before


def test_a_stopped_ladder_goes_on_where_it_stopped(
    tiny: Tiny,
    climbed: tuple[Path, list[dict[str, Any]]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "block_ap", stop)
        with pytest.raises(KeyboardInterrupt):
            ladder(job_of(tiny, tmp_path))
    assert [row["stage"] for row in read_json(tmp_path / "results.json")["rows"]] == STAGES[:3]
    capsys.readouterr()
    rows = ladder(job_of(tiny, tmp_path))
    assert capsys.readouterr().out.count("already finished") == 2
    for row, expected in zip(rows, climbed[1], strict=True):
        assert row | {"seconds": 0} == expected | {"seconds": 0}


def test_fresh_discards_finished_rungs(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[bool] = []

    def spy(job: Any) -> Path:
        made.append(job.overwrite)
        return block_ap(job)

    monkeypatch.setattr(module, "block_ap", spy)
    ladder(job_of(tiny, tmp_path))
    changed = replace(job_of(tiny, tmp_path), block_ap=block_ap_job(tiny, None, seed=1))
    with pytest.raises(ConfigError, match="seed"):
        ladder(changed)
    ladder(replace(changed, overwrite=True))
    assert made == [False, False, True]


def test_the_table_has_a_line_per_rung(climbed: tuple[Path, list[dict[str, Any]]]) -> None:
    lines = table(climbed[1]).splitlines()
    assert len(lines) == 1 + len(STAGES)
    assert [line[:20].strip() for line in lines[1:]] == STAGES
