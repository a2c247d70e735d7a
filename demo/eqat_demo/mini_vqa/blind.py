"""What is to be had at mini-VQA without looking at the pictures."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain

from eqat_demo.llava.accuracy import accuracy_by_type, blind_answers
from eqat_demo.mini_vqa.pictures import Picture, pictures


def blind_accuracy() -> float:
    """The share of mini-VQA's test questions that the commonest training answer to their form gets right."""
    return blind_by_type(pictures("train"), pictures("test"))["all"]


def blind_by_type(train: Iterable[Picture], test: Iterable[Picture]) -> dict[str, float]:
    """Return that share for every type of question, and under `all` for all of them.

    A guess from the form of a question (which attributes its names have, and what it asks for) is better than one
    from its very words: most words come a few times only.
    """
    shown, asked = (list(chain.from_iterable(picture.asked for picture in part)) for part in (train, test))
    return accuracy_by_type(blind_answers(shown, asked), asked)
