"""mini-VQA as a task of lmms-eval: what tasks/mini_vqa/mini_vqa.yaml refers to.

The environment variable EQAT_MINI_VQA names another parquet file with the same columns.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from eqat_demo.easy_vqa_task import score as exact
from eqat_demo.mini_vqa.bars import VALUE
from eqat_demo.mini_vqa.folder import mini_vqa_folder
from eqat_demo.mini_vqa.words import HELD_OUT, SEEN

FILE_VARIABLE = "EQAT_MINI_VQA"
"""Environment variable that replaces the parquet file of test questions."""

_TOLERANCE = 0.05


def __getattr__(name: str) -> Any:
    """Compute `dataset_kwargs`, which the YAML file names, when it is read: listing tasks must not draw pictures."""
    if name != "dataset_kwargs":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    path = os.environ.get(FILE_VARIABLE) or str(mini_vqa_folder() / "test.parquet")
    return {"data_files": {"test": path}}


def score(question: Mapping[str, Any], answers: Sequence[str]) -> dict[str, float]:
    """Return exact match as easy-VQA's task has it, and what suits the type of the question.

    `character_error` of words is the edits between both, for each character of the right one, from 0 to 1; with the
    suffix `_held_out` it is that of words that training does not show. `relaxed_accuracy` of heights is 1 for a
    number that is wrong by a twentieth at most.
    """
    scores, given, right = exact(question, answers), _plain(answers[0]), question["answer"].lower()
    if question["type"] in (SEEN, HELD_OUT):
        scores["character_error"] = error = min(1.0, edits(given, right) / len(right))
        if question["type"] == HELD_OUT:
            scores["character_error_held_out"] = error
    if question["type"] == VALUE:
        scores["relaxed_accuracy"] = float(_is_near(given, right))
    return scores


def edits(one: str, other: str) -> int:
    """Return how many characters must be put in, taken out or replaced to make one text of the other."""
    row = list(range(len(other) + 1))
    for place, character in enumerate(one, 1):
        before, row[0] = row[0], place
        for at, wanted in enumerate(other, 1):
            before, row[at] = row[at], min(row[at] + 1, row[at - 1] + 1, before + (character != wanted))
    return row[-1]


def _plain(answer: str) -> str:
    return answer.strip().removesuffix(".").lower()


def _is_near(given: str, right: str) -> bool:
    try:
        return abs(float(given) - float(right)) <= _TOLERANCE * float(right)
    except ValueError:
        return False
