"""`eqat eval --tasks --likelihood` and `--task_file`: what stands beside accuracy."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from eqat_demo.easy_vqa_task import FILE_VARIABLE
from eqat_mm.cli import run_command
from eqat_mm.commands.plumbing import task_files
from eqat_mm.commands.plumbing.answers import Answers, compared
from eqat_mm.commands.plumbing.models import load_model
from eqat_mm.commands.plumbing.task_files import Asking, evaluate_task_file
from eqat_mm.commands.verbs.evaluate import EvalJob, evaluate
from eqat_mm.commands.verbs.quantize import RTNJob, rtn
from eqat_mm.errors import ConfigError, DataError
from eqat_mm.runtime.ranks import ALONE, Ranks
from tests.checkpoint.files import assert_four_lines
from tests.commands.jobs import SPEC
from tests.eval.questions import write_questions
from tests.thread_ranks import in_threads, one_at_a_time
from tests.tiny_llava import save_tiny_llava

needs_lmms_eval = pytest.mark.skipif(importlib.util.find_spec("lmms_eval") is None, reason="needs lmms-eval")
ignores_warnings = pytest.mark.filterwarnings("ignore")  # lmms-eval 0.7.3 and its imports warn; 2026-11-27

CHOICES = [
    {"query": "w5 w6", "choices": ["w7 w8", "w9"], "gold": 0},
    {"query": "w10", "choices": ["w11", "w12", "w13"], "gold": 2},
    {"context_options": ["w14 w15", "w16"], "continuation": "w17", "gold": 1},
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return a full-precision LLaVA, and the same rounded."""
    root = tmp_path_factory.mktemp("answers")
    save_tiny_llava(root / "full", dtype=torch.float32)
    return root / "full", rtn(RTNJob(model=str(root / "full"), output=root / "rtn", quant=SPEC))


@pytest.fixture
def questions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_questions(tmp_path / "questions.parquet")
    monkeypatch.setenv(FILE_VARIABLE, str(tmp_path / "questions.parquet"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))


@needs_lmms_eval
@ignores_warnings
@pytest.mark.usefixtures("questions")
def test_likelihood_divergence_and_flips(folders: tuple[Path, Path], tmp_path: Path) -> None:
    full, packed = map(str, folders)
    asked: dict[str, Any] = {"tasks": "easy_vqa", "device": "cpu", "limit": 4, "likelihood": True, "batch_size": 3}
    alone = evaluate(EvalJob(full, output=tmp_path / "full.json", **asked))["tasks"]["easy_vqa"]
    assert alone["nll"] > 0
    assert "kl" not in alone
    itself = evaluate(EvalJob(full, full, **asked))
    assert itself["tasks"]["easy_vqa"]["kl"] == pytest.approx(0, abs=1e-6)
    assert itself["tasks"]["easy_vqa"]["flips"] == 0
    assert itself["reference"]["tasks"]["easy_vqa"]["nll"] == pytest.approx(alone["nll"], abs=1e-5)
    beside = evaluate(EvalJob(packed, full, **asked))["tasks"]["easy_vqa"]
    kept = evaluate(EvalJob(packed, str(tmp_path / "full.json"), output=tmp_path / "rtn.json", **asked))
    assert kept["tasks"]["easy_vqa"] == beside
    assert "reference" not in kept
    assert beside["kl"] > 1e-4
    records = [json.loads(line) for line in (tmp_path / "rtn.answers.jsonl").read_text("utf-8").splitlines()]
    assert sum(each["nll"] for each in records) / 4 == pytest.approx(beside["nll"])
    assert [each["tokens"] for each in records] == [2] * 4  # the word and the end


@needs_lmms_eval
@ignores_warnings
@pytest.mark.usefixtures("questions")
def test_a_reference_that_was_asked_less_is_refused(folders: tuple[Path, Path], tmp_path: Path) -> None:
    asked: dict[str, Any] = {"tasks": "easy_vqa", "device": "cpu", "likelihood": True}
    evaluate(EvalJob(str(folders[0]), output=tmp_path / "full.json", limit=2, **asked))
    with pytest.raises(ConfigError, match="no prediction for question") as raised:
        evaluate(EvalJob(str(folders[1]), str(tmp_path / "full.json"), limit=3, **asked))
    assert_four_lines(raised.value)


def test_a_result_that_is_not_there_is_refused(folders: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"full\.json") as raised:
        evaluate(EvalJob(str(folders[1]), str(tmp_path / "full.json"), tasks="easy_vqa", device="cpu"))
    assert_four_lines(raised.value)


def test_flips_are_counted_where_both_were_asked() -> None:
    def answers(*scores: float) -> Answers:
        return Answers([{"task": "t", "question": at, "score": score} for at, score in enumerate(scores)])

    assert compared("t", answers(1, 0, 1, 1), answers(1, 1, 0)) == {"flips": pytest.approx(2 / 3)}
    assert compared("other", answers(1), answers(1)) == {}
    assert compared("t", answers(1), None) == {}


# ---- multiple choice --------------------------------------------------------------------------------


def write_choices(path: Path) -> Path:
    path.write_text("\n".join(map(json.dumps, CHOICES)), "utf-8")
    return path


def test_the_command_answers_a_file(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, output = write_choices(tmp_path / "piqa.jsonl"), tmp_path / "result.json"
    flags = ["--model", str(folders[1]), "--reference", str(folders[0]), "--device", "cpu", "--output", str(output)]
    assert run_command("eval", [*flags, "--task_file", str(file)]) == 0
    row = json.loads(output.read_text("utf-8"))["task_file"]
    assert row["file"] == str(file)
    assert row["questions"] == 3
    assert row["margin_change"] > 0
    assert "flips" in capsys.readouterr().out.splitlines()[-1]
    itself = evaluate(EvalJob(str(folders[0]), str(folders[0]), task_file=file, device="cpu", limit=2))["task_file"]
    assert (itself["questions"], itself["flips"], itself["margin_change"]) == (2, 0.0, 0.0)


def test_two_processes_find_what_one_finds(
    folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_choices(tmp_path / "piqa.jsonl")
    monkeypatch.setattr(task_files, "load_model", one_at_a_time(load_model))

    def found(ranks: Ranks) -> dict[str, Any]:
        asking = Asking(2, torch.device("cpu"), torch.float32, ranks)
        row = evaluate_task_file(folders[1], folders[0], file, None, asking)["task_file"]
        return {name: value for name, value in row.items() if name != "file"}

    alone = found(ALONE)
    for together in in_threads(2, found):
        assert together == pytest.approx(alone, rel=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": "easy_vqa"}, "--task_file"),
        ({"likelihood": True}, "--likelihood"),
        ({"template": "vicuna_v1"}, "--template"),
    ],
)
def test_what_a_file_has_no_use_for_is_refused(
    folders: tuple[Path, Path], tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    job = EvalJob(str(folders[0]), device="cpu", task_file=write_choices(tmp_path / "file.jsonl"), **options)
    with pytest.raises(ConfigError, match=message) as raised:
        evaluate(job)
    assert_four_lines(raised.value)


def test_a_file_of_another_form_is_refused_before_a_model_is_read(folders: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "file.jsonl").write_text('{"text": "w5"}', "utf-8")
    with pytest.raises(DataError, match="line 1, query"):
        evaluate(EvalJob(str(folders[0]), device="cpu", task_file=tmp_path / "file.jsonl"))
