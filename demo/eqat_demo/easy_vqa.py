"""easy-VQA in LLaVA's format: one record per question about one of 5,000 small images.

Every image shows one of three shapes in one of eight colours. There are 24 phrases, of four types: colour
("what color is the shape?"), shape ("what shape is in the image?"), yes_no ("is there a red shape?") and
yes_no_negated. The last are told by the words "not" *and* "no" ("is no yellow shape present?").

The folder in the cache holds `images/`, `train.json` and `test.json` in LLaVA's format, and `test.parquet` with the
columns question_id, image (bytes of a PNG file), question, answer and type. Its rows are shuffled, always in the same
way, so that the first n are a fair sample of all.
"""

from __future__ import annotations

import itertools
import shutil
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from eqat_demo.assets import ASSETS, fetch_asset, folder_made_of
from eqat_demo.question_files import record, write_parquet
from eqat_mm.errors import DataError
from eqat_mm.runtime.files import read_json, write_json

COLOURS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
SHAPES = ("circle", "rectangle", "triangle")
QuestionType = Literal["colour", "shape", "yes_no", "yes_no_negated"]
Part = Literal["train", "test"]

_ASSET = "easy-vqa"
_LAYOUT = 1  # raise it whenever the folder changes: old ones are then made anew
_NOTE = f"""# easy-VQA in LLaVA's format

{ASSETS[_ASSET].description}

- source: the wheel `{ASSETS[_ASSET].requirement}`; images unchanged, questions and answers word for word
- changes: one record per question; types of questions; test.parquet is shuffled
- licence: {ASSETS[_ASSET].license} (see LICENSE)
"""


@dataclass(frozen=True)
class Question:
    """What a question means.

    Attributes:
        type: what kind of answer it wants.
        colour: the colour that it names.
        shape: the shape that it names.
    """

    type: QuestionType
    colour: str | None = None
    shape: str | None = None

    def answer(self, colour: str, shape: str) -> str | None:
        """Return the answer for an image of one `shape` in one `colour`; None where the question names another."""
        is_there = self.colour in (None, colour) and self.shape in (None, shape)
        if self.type == "yes_no":
            return "yes" if is_there else "no"
        if self.type == "yes_no_negated":
            return "no" if is_there else "yes"
        if not is_there:
            return None
        return colour if self.type == "colour" else shape


def parse_question(text: str) -> Question:
    """Return what one of the data set's questions means.

    Raises:
        DataError: it is none of their phrases, as far as type and number of named things tell.
    """
    words = text.lower().rstrip("?").split()
    colours = [word for word in words if word in COLOURS]
    shapes = [word for word in words if word in SHAPES]
    kind: QuestionType
    if words[:1] == ["what"]:
        kind, at_least = ("colour" if "color" in words else "shape"), 0
    else:
        kind, at_least = ("yes_no_negated" if {"no", "not"} & set(words) else "yes_no"), 1
    if at_least <= len(colours) + len(shapes) <= 1:
        return Question(kind, next(iter(colours), None), next(iter(shapes), None))
    raise DataError("easy-VQA", repr(text), "one of its 24 phrases", "use the pinned version of the data set")


def image_contents(questions: Iterable[tuple[str, str, int]]) -> dict[int, tuple[str | None, str | None]]:
    """Return (colour, shape) of every image as its questions and answers tell; None where they leave it open.

    Args:
        questions: (question, answer, number of the image), as published.

    Raises:
        DataError: no colour and shape agrees with all answers about an image.
    """
    possible: defaultdict[int, set[tuple[str, str]]] = defaultdict(lambda: set(itertools.product(COLOURS, SHAPES)))
    for text, answer, image in questions:
        question = parse_question(text)
        possible[image] = {pair for pair in possible[image] if question.answer(*pair) == answer}
        if not possible[image]:
            raise DataError(
                f"easy-VQA, image {image}",
                f"{answer!r} to {text!r} contradicts the other answers",
                "one colour and one shape that agree with all of them",
                "use the pinned version of the data set",
            )
    return {
        image: (_only(pair[0] for pair in pairs), _only(pair[1] for pair in pairs)) for image, pairs in possible.items()
    }


def _only(names: Iterable[str]) -> str | None:
    different = set(names)
    return different.pop() if len(different) == 1 else None


def published_questions(part: Part, cache: Path | None = None) -> list[tuple[str, str, int]]:
    """Return (question, answer, number of the image) as published, fetching the asset if necessary."""
    return _published(fetch_asset(_ASSET, cache), part)


def _published(source: Path, part: Part) -> list[tuple[str, str, int]]:
    return [(text, answer, image) for text, answer, image in read_json(_data(source) / part / "questions.json")]


def easy_vqa_folder(cache: Path | None = None) -> Path:
    """Return the folder with easy-VQA in LLaVA's format, making it on the first call; see the module.

    Args:
        cache: folder of all assets, instead of `asset_cache()`.

    Raises:
        DataError: the asset cannot be fetched, or a question is not understood as its answer demands.
    """
    how = f"layout:{_LAYOUT}"
    return folder_made_of(_ASSET, f"{_ASSET}-llava", how, _write, readme=_NOTE, cache=cache)


def _write(source: Path, folder: Path) -> None:
    for part in ("train", "test"):
        shutil.copytree(_data(source) / part / "images", folder / "images" / part)
        questions = _published(source, part)
        image_contents(questions)  # what is not understood is found here
        write_json(folder / f"{part}.json", _records(part, questions))
    write_parquet(folder, read_json(folder / "test.json"), "easy-VQA test order")


def training_questions() -> Path:
    """The 38,575 training questions of easy-VQA about 4,000 images of one coloured shape (MIT), 3 MB."""
    return easy_vqa_folder() / "train.json"


def _data(source: Path) -> Path:
    return source / "easy_vqa" / "data"


def _records(part: Part, questions: list[tuple[str, str, int]]) -> list[dict[str, Any]]:
    return [
        record(f"{part}-{number}", f"images/{part}/{image}.png", text, answer, parse_question(text).type)
        for number, (text, answer, image) in enumerate(questions)
    ]
