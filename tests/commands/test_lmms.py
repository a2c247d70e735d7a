"""`eqat eval --tasks`."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from eqat_demo.easy_vqa_task import FILE_VARIABLE
from eqat_mm.cli import run_command
from eqat_mm.commands import lmms
from eqat_mm.commands.evaluate import EvalJob, evaluate
from eqat_mm.commands.lmms import SUITES, task_line, task_names, task_row, tasks_folders
from eqat_mm.commands.quantize import RTNJob, rtn
from eqat_mm.errors import ConfigError
from tests.checkpoint.files import assert_four_lines
from tests.commands.jobs import SPEC
from tests.eval.questions import TYPES, write_questions
from tests.tiny_llava import save_tiny_llava

needs_lmms_eval = pytest.mark.skipif(importlib.util.find_spec("lmms_eval") is None, reason="needs lmms-eval")
ignores_warnings = pytest.mark.filterwarnings("ignore")  # lmms-eval 0.7.3 and its imports warn; 2026-11-23


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny") / "tiny-llava"
    save_tiny_llava(path, dtype=torch.float32)
    return path


@needs_lmms_eval
@ignores_warnings
def test_the_command_scores_a_task(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_questions(tmp_path / "questions.parquet")
    monkeypatch.setenv(FILE_VARIABLE, str(tmp_path / "questions.parquet"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    output = tmp_path / "result.json"
    flags = ["--model", str(folder), "--device", "cpu", "--output", str(output)]
    assert run_command("eval", [*flags, "--tasks", "easy_vqa", "--limit", "5"]) == 0
    result = json.loads(output.read_text(encoding="utf-8"))
    assert result["bits_per_weight"] is None
    row = result["tasks"]["easy_vqa"]
    assert row["questions"] == 5
    assert 0 <= row["accuracy"] <= 1
    assert set(row["by_type"]) == set(TYPES)
    answers = [json.loads(line) for line in (tmp_path / "result.answers.jsonl").read_text("utf-8").splitlines()]
    assert [answer["question"] for answer in answers] == [0, 1, 2, 3, 4]
    assert answers[1]["asked"] == "w5 w7"
    assert answers[1]["right"] == "w11"
    assert sum(answer["answer"] == [answer["right"]] for answer in answers) == row["accuracy"] * 5


@needs_lmms_eval
@ignores_warnings
def test_full_precision_answers_beside(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_questions(tmp_path / "questions.parquet")
    monkeypatch.setenv(FILE_VARIABLE, str(tmp_path / "questions.parquet"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    packed = rtn(RTNJob(model=str(folder), output=tmp_path / "rtn", quant=SPEC))
    asked: dict[str, Any] = {"tasks": "easy_vqa", "device": "cpu", "limit": 4}
    alone = evaluate(EvalJob(str(folder), **asked))
    both = evaluate(EvalJob(str(packed), str(folder), output=tmp_path / "both.json", **asked))
    assert both["reference"]["tasks"] == alone["tasks"]
    assert both["bits_per_weight"] > 0
    assert {path.name for path in tmp_path.glob("both*")} == {
        "both.json",
        "both.answers.jsonl",
        "both.reference.answers.jsonl",
    }
    said = capsys.readouterr().out.splitlines()[-2:]
    assert [line.split(": easy_vqa")[0] for line in said] == [str(packed), str(folder)]


@needs_lmms_eval
def test_a_suite_stands_for_tasks_that_lmms_eval_has() -> None:
    import lmms_eval

    assert task_names("llava-1.5,mme,easy_vqa") == [*SUITES["llava-1.5"], "easy_vqa"]
    files = Path(lmms_eval.__file__).parent.joinpath("tasks").rglob("*.yaml")
    stems = {path.stem for path in files}
    assert all(name in stems for names in SUITES.values() for name in names)


@needs_lmms_eval
@ignores_warnings
def test_an_unknown_task_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lmms_eval.tasks.TaskManager.initialize_tasks", lambda *_, **__: {"easy_vqa": {"type": "task"}})
    with pytest.raises(ConfigError, match="similar: easy_vqa") as raised:
        evaluate(EvalJob(str(folder), tasks="easy_vqq", device="cpu"))
    assert_four_lines(raised.value)


def test_without_lmms_eval_the_extra_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lmms.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"eqat-mm\[lmms-eval,vlm\]") as raised:
        evaluate(EvalJob(str(folder), tasks="easy_vqa", device="cpu"))
    assert_four_lines(raised.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"limit": 5}, "no --tasks"),
        ({"tasks": " , "}, "separated by commas"),
        ({"tasks": "easy_vqa", "limit": 0}, "--limit"),
    ],
    ids=["limit without tasks", "no name", "limit of zero"],
)
def test_options_that_do_not_fit_are_refused(folder: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        evaluate(EvalJob(str(folder), device="cpu", **options))  # type: ignore[arg-type]
    assert_four_lines(raised.value)


def test_names_are_separated_by_commas() -> None:
    assert task_names("easy_vqa, mme,") == ["easy_vqa", "mme"]


def test_a_row_tells_accuracy_and_types_apart_from_other_metrics() -> None:
    found = {
        "alias": "easy_vqa",
        "exact_match,none": 0.75,
        "exact_match_stderr,none": "N/A",
        "exact_match_shape,none": 0.5,
    }
    row = task_row(found, {"original": 9, "effective": 4})
    assert (row["accuracy"], row["questions"], row["by_type"]) == (0.75, 4, {"shape": 0.5})
    assert task_line("easy_vqa", row) == "easy_vqa: accuracy 75.0% (shape 50.0%) on 4 questions"


def test_other_metrics_are_named() -> None:
    row = task_row({"mme_perception_score,none": 1510.25}, {"effective": 2374})
    assert task_line("mme", row) == "mme: mme_perception_score 1510 on 2,374 questions"


def test_a_metric_over_no_question_is_left_out() -> None:
    row = task_row({"exact_match,none": 0.5, "exact_match_shape,none": math.nan, "other,none": math.inf}, None)
    assert row["metrics"] == {"exact_match": 0.5}
    assert row["by_type"] == {}


def test_the_demo_brings_its_task() -> None:
    assert any((Path(folder) / "easy_vqa" / "easy_vqa.yaml").is_file() for folder in tasks_folders())
