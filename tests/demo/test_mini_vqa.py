"""mini-VQA: the same every time, answers as the pictures have them, balanced, held-out words kept out of training."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pyarrow import parquet

from eqat_demo.mini_vqa.bars import Chart
from eqat_demo.mini_vqa.blind import blind_by_type
from eqat_demo.mini_vqa.drawing import INK, PAPER
from eqat_demo.mini_vqa.folder import mini_vqa_folder
from eqat_demo.mini_vqa.pictures import PARTS, Counts, Picture, pictures
from eqat_demo.mini_vqa.scenes import GRID, SIDE, SQUARE, Scene
from eqat_demo.mini_vqa.words import LETTERS, WORDS, Written, is_held_out
from eqat_demo.python_code import python_library
from tests.checkpoint.files import contents
from tests.data.records import read_records

FEW = Counts(scenes=6, charts=3, words=4)


@pytest.fixture(scope="module")
def drawn() -> list[Picture]:
    return list(pictures("test"))


@pytest.fixture(scope="module")
def shown() -> list[Picture]:
    """Return some that training shows."""
    return list(pictures("train", Counts(250, 50, 500)))


# ---- what a picture shows, found out again from its pixels ------------------------------------------


def seen_on(image: Image.Image) -> list[dict[str, object]]:
    """Return the things on a scene: colour, middle and width of what is no paper in each square."""
    pixels = np.asarray(image).astype(int)
    inks = {rgb: name for name, rgb in INK.items()}
    found = []
    for row in range(GRID):
        for column in range(GRID):
            square = pixels[row * SQUARE : (row + 1) * SQUARE, column * SQUARE : (column + 1) * SQUARE]
            inked = (square != PAPER).any(-1)
            if not inked.any():
                continue
            rows, columns = np.nonzero(inked)
            middle = (
                column * SQUARE + (columns.min() + columns.max()) / 2,
                row * SQUARE + (rows.min() + rows.max()) / 2,
            )
            size = "large" if np.ptp(columns) > 12 else "small"
            (colour,) = {inks[tuple(rgb)] for rgb in square[inked].tolist()}
            found.append({"size": size, "colour": colour, "shape": shape_of(inked), "at": middle})
    return found


def shape_of(inked: np.ndarray) -> str:
    """Return which shape it is: a circle fills more of its box than a cross, and a triangle stands on a whole line."""
    rows, columns = np.nonzero(inked)
    box = inked[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    if box.all():
        return "square"
    if box[-1].all() and not box[0].all():
        return "triangle"
    return "circle" if box.mean() > 0.65 else "cross"


def test_what_is_drawn_is_what_is_there(drawn: list[Picture]) -> None:
    for picture in drawn[: PARTS["test"].scenes]:
        assert isinstance(picture.content, Scene)
        things = sorted((t.size, t.colour, t.shape, t.x, t.y) for t in picture.content.things)
        seen = sorted((s["size"], s["colour"], s["shape"], *map(round, s["at"])) for s in seen_on(picture.image()))  # type: ignore[call-overload]
        assert things == seen


def test_bars_and_words_are_drawn_as_told(drawn: list[Picture]) -> None:
    for picture in drawn[PARTS["test"].scenes :]:
        pixels, content = np.asarray(picture.image()), picture.content
        assert pixels.shape == (SIDE, SIDE, 3)
        inked = (pixels != PAPER).any(-1)
        if isinstance(content, Chart):
            heights = inked.sum(0).reshape(GRID, SQUARE).max(1)
            assert {bar.column: bar.height for bar in content.bars} == {at: h for at, h in enumerate(heights) if h}
        else:
            assert isinstance(content, Written)
            letters = inked.any(0).reshape(LETTERS, SQUARE // 2).any(1)
            assert [at for at, there in enumerate(letters) if there] == [
                content.column + place for place in range(len(content.word))
            ]


# ---- answers, found out again from the words of the questions ---------------------------------------

COLOUR, SHAPE = "black|blue|green|purple|red|yellow", "circle|square|triangle|cross"


def called(words: str, things: list[dict[str, object]]) -> list[dict[str, object]]:
    """Return the things that words such as "small red circles" are about."""
    kept = things
    for kind, values in (("size", "small|large"), ("colour", COLOUR), ("shape", SHAPE)):
        if named := re.search(rf"\b({values})(es|s)?\b", words):
            kept = [thing for thing in kept if thing[kind] == named[1]]
    return kept


def only(things: list[dict[str, object]]) -> dict[str, object]:
    assert len(things) == 1
    return things[0]


def away(one: dict[str, object], other: dict[str, object]) -> float:
    return float(np.hypot(*np.subtract(one["at"], other["at"])))  # type: ignore[arg-type]


def answer_to(question: str, things: list[dict[str, object]]) -> str:
    if match := re.fullmatch(r"Is there a (.+)\?", question):
        return "yes" if called(match[1], things) else "no"
    if match := re.fullmatch(r"How many (.+) are there\?", question):
        return str(len(called(match[1], things)))
    if match := re.fullmatch(r"Are there (more|fewer|as many) (.+) (?:than|as) (.+)\?", question):
        one, other = len(called(match[2], things)), len(called(match[3], things))
        return "yes" if {"more": one > other, "fewer": one < other, "as many": one == other}[match[1]] else "no"
    if match := re.fullmatch(r"What (\w+) is the (.+) (left of|right of|above|below) the (.+)\?", question):
        place = only(called(match[4], things))
        axis, sign = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1)}[match[3]]
        beside = [t for t in called(match[2], things) if sign * (t["at"][axis] - place["at"][axis]) > 2]  # type: ignore[index]
        return str(only(beside)[match[1]])
    if match := re.fullmatch(r"What (\w+) is the (.+)\?", question):
        return str(only(called(match[2], things))[match[1]])
    if match := re.fullmatch(r"What is (nearest to|furthest from) the (.+)\?", question):
        place = only(called(match[2], things))
        others = sorted((t for t in things if t is not place), key=lambda t: away(t, place))
        found = others[0 if match[1] == "nearest to" else -1]
        return f"{found['colour']} {found['shape']}"
    match = re.fullmatch(r"List the (\w+)s from (\w+) to \w+\.", question)
    assert match, question
    axis, backwards = {"left": (0, 0), "right": (0, 1), "top": (1, 0), "bottom": (1, 1)}[match[2]]
    ordered = sorted(things, key=lambda t: t["at"][axis], reverse=bool(backwards))  # type: ignore[index]
    return ", ".join(str(thing[match[1]]) for thing in ordered)


def test_answers_about_scenes_are_right(drawn: list[Picture]) -> None:
    families = Counter()
    for picture in drawn[: PARTS["test"].scenes]:
        things = seen_on(picture.image())
        for asked in picture.asked:
            assert answer_to(asked.question, things) == asked.answer, (asked, things)
            families[asked.type] += 1
    assert set(families) == {"exist", "count", "compare", "query", "relate", "nearest", "list"}
    assert min(families.values()) > PARTS["test"].scenes / 2
    assert max(len(picture.asked) for picture in drawn) == 13


def test_answers_about_bars_and_words_are_right(drawn: list[Picture]) -> None:
    for picture in drawn[PARTS["test"].scenes :]:
        content = picture.content
        if isinstance(content, Written):
            assert [asked.answer.replace(" ", "") for asked in picture.asked] == [content.word] * 2
            continue
        assert isinstance(content, Chart)
        heights = {bar.colour: bar.height for bar in content.bars}
        for asked in picture.asked:
            assert asked.answer == answer_about_bars(asked.question, heights)


def answer_about_bars(question: str, heights: dict[str, int]) -> str:
    named = re.findall(COLOUR, question)
    if question.startswith("How high"):
        return str(heights[named[0]])
    if question.startswith("Which"):
        return (max if "highest" in question else min)(heights, key=heights.__getitem__)
    return "yes" if heights[named[0]] > heights[named[1]] else "no"


# ---- the whole --------------------------------------------------------------------------------------


def test_it_is_the_same_every_time_and_the_parts_differ() -> None:
    first, again = (list(pictures("train", FEW)) for _ in range(2))
    assert first == again
    assert first[0].content != next(pictures("test", FEW)).content
    assert list(islice(pictures("train"), FEW.scenes)) == first[: FEW.scenes]  # more of them begin with fewer


def test_no_answer_is_to_be_had_blind(shown: list[Picture], drawn: list[Picture]) -> None:
    share = blind_by_type(shown, drawn)
    bounds = {"all": 0.33, "exist": 0.6, "count": 0.32, "compare": 0.6, "query": 0.35, "relate": 0.3, "nearest": 0.12}
    for kind, most in bounds.items():
        assert share[kind] < most, (kind, share)


def test_answers_are_balanced_within_a_form(shown: list[Picture]) -> None:
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    for picture in shown:
        for asked in picture.asked:
            if asked.type in ("exist", "compare"):
                answers[asked.form][asked.answer] += 1
    for form, counted in answers.items():
        assert max(counted.values()) < 1.3 * min(counted.values()) + 5, (form, counted)


def test_held_out_words_are_never_in_training(shown: list[Picture], drawn: list[Picture]) -> None:
    share = sum(map(is_held_out, WORDS)) / len(WORDS)
    assert 0.15 < share < 0.25
    assert len(set(WORDS)) == len(WORDS)
    assert max(map(len, WORDS)) <= LETTERS
    train, test = ([p.content.word for p in part if isinstance(p.content, Written)] for part in (shown, drawn))
    assert len(train) == 500
    assert not any(map(is_held_out, train))
    assert sum(map(is_held_out, test)) == len(test) / 2


def test_the_test_part_has_enough_questions(drawn: list[Picture]) -> None:
    asked = [each for picture in drawn for each in picture.asked]
    assert len(asked) >= 3000
    assert min(Counter(each.type for each in asked).values()) >= 100
    assert PARTS["train"].all > 10_000


def test_the_folder_is_read_as_training_data_and_as_a_task(tmp_path: Path) -> None:
    parts = {"train": FEW, "test": FEW}
    folder = mini_vqa_folder(tmp_path / "one", parts)  # type: ignore[arg-type]
    assert contents(folder) == contents(mini_vqa_folder(tmp_path / "two", parts))  # type: ignore[arg-type]
    records = read_records(str(folder / "train.json"))
    assert len(records) == sum(len(picture.asked) for picture in pictures("train", FEW))
    rows = parquet.read_table(folder / "test.parquet").to_pylist()
    asked = [(each.question, each.answer, each.type) for p in pictures("test", FEW) for each in p.asked]
    assert sorted((row["question"], row["answer"], row["type"]) for row in rows) == sorted(asked)
    assert [row["question_id"] for row in rows] != sorted(row["question_id"] for row in rows)
    first = json.loads((folder / "train.json").read_text())[0]
    shown = Image.open(folder / first["image"]).convert("RGB")
    assert shown.tobytes() == next(pictures("train", FEW)).image().tobytes()


def test_python_s_library_is_a_text() -> None:
    texts = python_library()
    assert len(texts) > 200
    assert any("class OrderedDict" in text for text in texts)
    assert not any("import pytest" in text for text in texts)
