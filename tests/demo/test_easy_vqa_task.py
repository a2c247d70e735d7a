"""The task easy_vqa: its score, and where its data comes from."""

from __future__ import annotations

from pathlib import Path

import pytest

from eqat_demo import easy_vqa_task as easy_vqa


@pytest.mark.parametrize(
    ("answer", "right"),
    [("yes", 1.0), (" Yes.\n", 1.0), ("no", 0.0), ("yes it is", 0.0), ("", 0.0)],
    ids=["exact", "case and full stop", "wrong", "longer", "empty"],
)
def test_only_the_exact_answer_counts(answer: str, right: float) -> None:
    question = {"answer": "yes", "type": "yes_no_negated"}
    assert easy_vqa.score(question, [answer]) == {"exact_match": right, "exact_match_yes_no_negated": right}


def test_the_environment_names_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(easy_vqa.FILE_VARIABLE, "questions.parquet")
    assert easy_vqa.dataset_kwargs == {"data_files": {"test": "questions.parquet"}}


def test_otherwise_it_is_the_one_in_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(easy_vqa.FILE_VARIABLE, raising=False)
    monkeypatch.setattr(easy_vqa, "easy_vqa_folder", lambda: tmp_path)
    assert easy_vqa.dataset_kwargs == {"data_files": {"test": str(tmp_path / "test.parquet")}}


def test_other_names_are_unknown() -> None:
    with pytest.raises(AttributeError, match="no attribute 'data'"):
        easy_vqa.data  # noqa: B018
