"""`eqat e2e-qp --teacher`: the full-precision model in memory, or a file of its hidden states."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from eqat_mm.commands.plumbing import teacher
from eqat_mm.commands.verbs.quantize import rtn
from eqat_mm.commands.verbs.tune import E2EQPJob, e2e_qp
from eqat_mm.errors import ConfigError
from tests.checkpoint.files import assert_four_lines
from tests.commands.jobs import e2e_qp_job, rtn_job
from tests.tiny_model import Tiny


@pytest.fixture(scope="module")
def base(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Packed by round-to-nearest; not to be altered."""
    return rtn(rtn_job(tiny, tmp_path_factory.mktemp("base")))


def job(tiny: Tiny, base: Path, folder: Path, **changes: Any) -> E2EQPJob:
    return replace(e2e_qp_job(tiny, base, folder), loss="kl", max_steps=3, **changes)


def losses(folder: Path) -> list[float]:
    records = map(json.loads, (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [record["loss"] for record in records if "loss" in record]


def test_runs_side_by_side_share_a_file(
    tiny: Tiny, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    e2e_qp(job(tiny, base, tmp_path / "memory", teacher="memory"))
    assert not list(tmp_path.glob("teacher-*"))
    e2e_qp(job(tiny, base, tmp_path / "first", teacher="cache"))
    assert len(list(tmp_path.glob("teacher-*.bin"))) == 1
    assert losses(tmp_path / "first") == pytest.approx(losses(tmp_path / "memory"), rel=1e-2)
    monkeypatch.setattr(teacher, "load_model", None)
    e2e_qp(job(tiny, base, tmp_path / "second", teacher="cache", seed=1))
    assert losses(tmp_path / "second") != losses(tmp_path / "first")


@pytest.mark.parametrize(("max_steps", "kept"), [(5, "memory"), (6, "cache")])
def test_by_itself_it_is_kept_where_all_text_is_read(
    tiny: Tiny, base: Path, tmp_path: Path, max_steps: int, kept: str
) -> None:
    e2e_qp(replace(job(tiny, base, tmp_path / "run"), max_steps=max_steps))
    record = json.loads((tmp_path / "run/run.json").read_text(encoding="utf-8"))
    assert record["config"]["teacher"] == kept
    assert len(list(tmp_path.glob("teacher-*.bin"))) == (kept == "cache")


def test_it_needs_predictions_to_learn(tiny: Tiny, base: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no teacher") as caught:
        e2e_qp(replace(job(tiny, base, tmp_path / "run", teacher="cache"), loss="cross-entropy"))
    assert_four_lines(caught.value)
    assert not (tmp_path / "run").exists()
