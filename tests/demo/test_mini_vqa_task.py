"""The task mini_vqa: its scores, and where its data comes from."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
import yaml

from eqat_demo.mini_vqa import task
from eqat_demo.mini_vqa.pictures import Counts, pictures
from eqat_mm.commands.verbs.evaluate import EvalJob, evaluate
from tests.eval.questions import write_questions
from tests.tiny_llava import save_tiny_llava


def test_a_colour_is_right_or_wrong() -> None:
    question = {"answer": "red", "type": "query"}
    assert task.score(question, [" Red.\n"]) == {"exact_match": 1.0, "exact_match_query": 1.0}
    assert task.score(question, ["blue"]) == {"exact_match": 0.0, "exact_match_query": 0.0}


@pytest.mark.parametrize(
    ("answer", "error"), [("apple", 0.0), ("Aple", 0.2), ("maple", 0.4), ("", 1.0), ("something long", 1.0)]
)
def test_words_are_judged_by_their_characters(answer: str, error: float) -> None:
    found = task.score({"answer": "apple", "type": "word"}, [answer])
    assert found["character_error"] == pytest.approx(error)
    assert "character_error_held_out" not in found
    kept = task.score({"answer": "apple", "type": "word_held_out"}, [answer])
    assert kept["character_error_held_out"] == kept["character_error"] == pytest.approx(error)
    assert kept["exact_match_word_held_out"] == float(error == 0)


@pytest.mark.parametrize(("answer", "near"), [("80", 1), ("84", 1), ("76.0", 1), ("85", 0), ("high", 0), ("", 0)])
def test_heights_may_be_wrong_by_a_twentieth(answer: str, near: float) -> None:
    found = task.score({"answer": "80", "type": "bar_value"}, [answer])
    assert found["relaxed_accuracy"] == near
    assert found["exact_match"] == float(answer == "80")


@pytest.mark.parametrize(("one", "other", "count"), [("", "abc", 3), ("kitten", "sitting", 3), ("ab", "ba", 2)])
def test_edits_are_counted(one: str, other: str, count: int) -> None:
    assert task.edits(one, other) == task.edits(other, one) == count


def test_the_task_lists_every_score() -> None:
    file = Path(task.__file__).parents[1] / "tasks" / "mini_vqa" / "mini_vqa.yaml"
    listed = {each["metric"] for each in yaml.load(file.read_text(), _Loader)["metric_list"]}
    scored: set[str] = set()
    for picture in pictures("test", Counts(8, 4, 4)):
        for asked in picture.asked:
            scored |= set(task.score({"answer": asked.answer, "type": asked.type}, [asked.answer]))
    assert listed == scored


@pytest.mark.skipif(importlib.util.find_spec("lmms_eval") is None, reason="needs lmms-eval")
@pytest.mark.filterwarnings("ignore")  # lmms-eval 0.7.3 and its imports warn; 2026-11-27
def test_lmms_eval_reports_every_score(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny_llava(tmp_path / "llava", dtype=torch.float32)
    types = ("exist", "word", "word_held_out", "bar_value", "nearest")
    write_questions(tmp_path / "questions.parquet", types)
    monkeypatch.setenv(task.FILE_VARIABLE, str(tmp_path / "questions.parquet"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    job = EvalJob(str(tmp_path / "llava"), tasks="mini_vqa", device="cpu", likelihood=True, batch_size=6)
    row = evaluate(job)["tasks"]["mini_vqa"]
    assert set(row["by_type"]) == set(types)
    assert {"character_error", "character_error_held_out", "relaxed_accuracy"} < set(row["metrics"])
    assert row["nll"] > 0


class _Loader(yaml.SafeLoader):
    """Takes `!function` for its name."""


_Loader.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))


def test_the_environment_names_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(task.FILE_VARIABLE, "questions.parquet")
    assert task.dataset_kwargs == {"data_files": {"test": "questions.parquet"}}


def test_otherwise_it_is_the_one_in_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(task.FILE_VARIABLE, raising=False)
    monkeypatch.setattr(task, "mini_vqa_folder", lambda: tmp_path)
    assert task.dataset_kwargs == {"data_files": {"test": str(tmp_path / "test.parquet")}}


def test_other_names_are_unknown() -> None:
    with pytest.raises(AttributeError, match="no attribute 'data'"):
        task.data  # noqa: B018
