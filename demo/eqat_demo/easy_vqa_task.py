"""easy-VQA as a task of lmms-eval: what tasks/easy_vqa/easy_vqa.yaml refers to.

The questions are those of `eqat_demo.easy_vqa`, made in the asset cache when they are first asked for. The
environment variable EQAT_EASY_VQA names another parquet file with the same columns.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import datasets

from eqat_demo.easy_vqa import easy_vqa_folder

FILE_VARIABLE = "EQAT_EASY_VQA"
"""Environment variable that replaces the parquet file of test questions."""

METRIC = "exact_match"


def __getattr__(name: str) -> Any:
    """Compute `dataset_kwargs`, which the YAML file names, when it is read: listing tasks must not fetch data."""
    if name != "dataset_kwargs":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    path = os.environ.get(FILE_VARIABLE) or str(easy_vqa_folder() / "test.parquet")
    return {"data_files": {"test": path}}


def with_images(questions: datasets.Dataset) -> datasets.Dataset:
    """Return the questions with the column `image` decoded: bytes become Pillow images."""
    return questions.cast_column("image", datasets.Image())


def images(question: Mapping[str, Any]) -> list[Any]:
    """Return the image of a question."""
    return [question["image"].convert("RGB")]


def score(question: Mapping[str, Any], answers: Sequence[str]) -> dict[str, float]:
    """Return 1 for the right answer and 0 for another, under the name of all questions and of those of this type.

    Case, surrounding white space and a closing full stop do not count.
    """
    given = answers[0].strip().removesuffix(".").lower()
    right = float(given == question["answer"].lower())
    return {METRIC: right, f"{METRIC}_{question['type']}": right}
