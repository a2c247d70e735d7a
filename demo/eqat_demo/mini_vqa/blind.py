"""What is to be had at mini-VQA without looking at the pictures."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable

from eqat_demo.mini_vqa.asked import Asked
from eqat_demo.mini_vqa.folder import type_of
from eqat_demo.mini_vqa.pictures import Picture, pictures


def blind_accuracy() -> float:
    """The share of mini-VQA's test questions that the commonest training answer to their form gets right."""
    return blind_by_type(pictures("train"), pictures("test"))["all"]


def blind_by_type(train: Iterable[Picture], test: Iterable[Picture]) -> dict[str, float]:
    """Return that share for every type of question, and under `all` for all of them.

    A guess from the form of a question (which attributes its names have, and what it asks for) is better than one
    from its very words: most words come a few times only.
    """
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    for asked in _asked(train):
        answers[asked.form][asked.answer] += 1
    guesses = {form: counted.most_common(1)[0][0] for form, counted in answers.items()}
    right: dict[str, list[bool]] = defaultdict(list)
    for asked in _asked(test):
        for kind in ("all", type_of(asked)):
            right[kind].append(guesses.get(asked.form) == asked.answer)
    return {kind: sum(each) / len(each) for kind, each in right.items()}


def _asked(drawn: Iterable[Picture]) -> Iterable[Asked]:
    return (asked for picture in drawn for asked in picture.asked)
