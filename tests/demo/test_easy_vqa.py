"""Questions of easy-VQA mean what their answers say; the folder made of them is the same every time."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image
from pyarrow import parquet

from eqat_demo import easy_vqa as module
from eqat_demo.easy_vqa import (
    COLOURS,
    SHAPES,
    Part,
    Question,
    easy_vqa_folder,
    image_contents,
    parse_question,
    published_questions,
)
from eqat_mm.errors import DataError
from tests.checkpoint.files import contents
from tests.data.records import read_records

PHRASES = {
    "what color is the shape?": Question("colour"),
    "what is the color of the shape?": Question("colour"),
    "what color is the circle?": Question("colour", shape="circle"),
    "what is the color of the triangle?": Question("colour", shape="triangle"),
    "what shape is present?": Question("shape"),
    "what shape is in the image?": Question("shape"),
    "what shape does the image contain?": Question("shape"),
    "what is the teal shape?": Question("shape", colour="teal"),
    "is there a red shape?": Question("yes_no", colour="red"),
    "is there a rectangle in the image?": Question("yes_no", shape="rectangle"),
    "is a brown shape present?": Question("yes_no", colour="brown"),
    "does the image contain a circle?": Question("yes_no", shape="circle"),
    "is no yellow shape present?": Question("yes_no_negated", colour="yellow"),
    "is no triangle present?": Question("yes_no_negated", shape="triangle"),
    "is there not a blue shape?": Question("yes_no_negated", colour="blue"),
    "is there not a circle in the image?": Question("yes_no_negated", shape="circle"),
    "does the image not contain a gray shape?": Question("yes_no_negated", colour="gray"),
}


@pytest.mark.parametrize("phrase", PHRASES)
def test_phrases_are_understood(phrase: str) -> None:
    assert parse_question(phrase) == PHRASES[phrase]


@pytest.mark.parametrize(
    "phrase", ["how many shapes?", "is there a shape?", "what red circle?", "is a red circle present?"]
)
def test_other_phrases_are_refused(phrase: str) -> None:
    with pytest.raises(DataError, match="one of its 24 phrases"):
        parse_question(phrase)


@pytest.mark.parametrize(
    ("phrase", "answer"),
    [
        ("what color is the shape?", "red"),
        ("what shape is present?", "circle"),
        ("what color is the circle?", "red"),
        ("what color is the triangle?", None),
        ("what is the blue shape?", None),
        ("is there a red shape?", "yes"),
        ("is there a triangle?", "no"),
        ("is no yellow shape present?", "yes"),
        ("is no red shape present?", "no"),
        ("is there not a circle?", "no"),
        ("is there not a triangle?", "yes"),
    ],
)
def test_answers_about_a_red_circle(phrase: str, answer: str | None) -> None:
    assert parse_question(phrase).answer("red", "circle") == answer


def test_contents_follow_from_questions() -> None:
    asked = [
        ("what color is the circle?", "teal", 0),
        ("is there not a red shape?", "no", 1),
        ("is there a circle?", "no", 1),
        ("is no circle present?", "yes", 2),
        ("is there not a triangle?", "yes", 2),
    ]
    assert image_contents(asked) == {0: ("teal", "circle"), 1: ("red", None), 2: (None, "rectangle")}


def test_answers_that_contradict_each_other_are_named() -> None:
    asked = [("is there a red shape?", "yes", 4), ("is no red shape present?", "yes", 4)]
    with pytest.raises(DataError, match="'yes' to 'is no red shape present\\?'") as caught:
        image_contents(asked)
    assert caught.value.where == "easy-VQA, image 4"


@pytest.fixture
def asset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache whose asset, already fetched, has two images in each part."""
    source = tmp_path / "easy-vqa"
    for part, shift in (("train", 0), ("test", 2)):
        folder = source / "easy_vqa" / "data" / part
        (folder / "images").mkdir(parents=True)
        questions = []
        for number, (colour, shape) in enumerate((("red", "circle"), ("blue", "triangle"))):
            Image.new("RGB", (64, 64), colour).save(folder / "images" / f"{number}.png")
            asked = ["what color is the shape?", f"is no {colour} shape present?", "is there a circle?"][
                : 3 - shift // 2
            ]
            questions += [[text, parse_question(text).answer(colour, shape), number] for text in asked]
        (folder / "questions.json").write_text(json.dumps(questions))
    (source / "easy_vqa-1.0.dist-info").mkdir()
    (source / "easy_vqa-1.0.dist-info" / "LICENSE").write_text("MIT")
    monkeypatch.setattr("eqat_demo.assets.fetch_asset", lambda name, cache=None: source)
    return tmp_path


def test_the_folder_is_in_llavas_format(asset: Path) -> None:
    folder = easy_vqa_folder(asset)
    assert folder == asset / "easy-vqa-llava"
    records = read_records(str(folder / "train.json"))
    assert len(records) == 6
    conversation = records.conversation(4)
    assert [turn.text for turn in conversation.turns] == ["<image>\nis no blue shape present?", "no"]
    assert Image.open(conversation.images[0].file()).getpixel((0, 0)) == (0, 0, 255)
    assert [records.rows[at]["type"] for at in range(3)] == ["colour", "yes_no_negated", "yes_no"]
    assert "dequantized" not in (folder / "README.md").read_text()
    assert (folder / "LICENSE").read_text() == "MIT"


def test_the_test_questions_are_a_table(asset: Path) -> None:
    folder = easy_vqa_folder(asset)
    rows = parquet.read_table(folder / "test.parquet").to_pylist()
    records = {record["id"]: record for record in json.loads((folder / "test.json").read_text())}
    assert {row["question_id"] for row in rows} == set(records) == {f"test-{number}" for number in range(4)}
    for row in rows:
        record = records[row["question_id"]]
        assert list(row) == ["question_id", "image", "question", "answer", "type"]
        assert record["conversations"][0]["value"] == f"<image>\n{row['question']}"
        assert (record["conversations"][1]["value"], record["type"]) == (row["answer"], row["type"])
        assert (folder / record["image"]).read_bytes() == row["image"]


def test_the_folder_is_made_once_and_always_the_same(
    asset: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = easy_vqa_folder(asset)
    again = easy_vqa_folder(tmp_path_factory.mktemp("other"))
    assert contents(folder) == contents(again)
    monkeypatch.setattr(module, "_records", lambda *_: pytest.fail("made a second time"))
    assert easy_vqa_folder(asset) == folder


def test_a_misunderstood_question_leaves_nothing(asset: Path) -> None:
    path = asset / "easy-vqa" / "easy_vqa" / "data" / "test" / "questions.json"
    path.write_text(json.dumps([*json.loads(path.read_text()), ["is there a red shape?", "no", 0]]))
    with pytest.raises(DataError, match="contradicts"):
        easy_vqa_folder(asset)
    assert [entry.name for entry in asset.iterdir()] == ["easy-vqa"]


# ---- the real data --------------------------------------------------------------------------------

PIXELS = dict(
    black=(0, 0, 0), blue=(0, 0, 255), brown=(165, 42, 42), gray=(128, 128, 128), green=(0, 255, 0),
    red=(255, 0, 0), teal=(0, 128, 128), yellow=(255, 255, 0),
)  # fmt: skip


@pytest.mark.network
@pytest.mark.parametrize(("part", "questions", "images"), [("train", 38575, 4000), ("test", 9673, 1000)])
def test_all_real_questions_agree_with_their_answers(
    tmp_path_factory: pytest.TempPathFactory, part: Part, questions: int, images: int
) -> None:
    cache = tmp_path_factory.getbasetemp() / "real"
    asked = published_questions(part, cache)
    contents = image_contents(asked)  # raises where one does not
    assert (len(asked), len(contents)) == (questions, images)
    assert Counter(parse_question(text).type for text, _, _ in asked).keys() == {
        "colour", "shape", "yes_no", "yes_no_negated",
    }  # fmt: skip
    assert {shape for _, shape in contents.values()} == {*SHAPES, None}
    folder = easy_vqa_folder(cache) / "images" / part
    for number, (colour, _) in contents.items():
        pixels = np.asarray(Image.open(folder / f"{number}.png").convert("RGB")).reshape(-1, 3).astype(int)
        near = {name: int((np.abs(pixels - value).max(1) < 12).sum()) for name, value in PIXELS.items()}
        assert colour in (None, max(near, key=near.__getitem__)), (number, colour, near)
    assert set(PIXELS) == set(COLOURS)


@pytest.mark.network
def test_the_real_table_is_read_by_datasets(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> None:
    folder = easy_vqa_folder(tmp_path_factory.getbasetemp() / "real")
    files: Any = {"test": str(folder / "test.parquet")}
    table = datasets.load_dataset("parquet", data_files=files, split="test", cache_dir=str(tmp_path))
    assert len(table) == 9673
    share = Counter(table["type"][:500])
    assert abs(share["yes_no"] + share["yes_no_negated"] - 500 * 7136 / 9673) < 50  # the first rows are a fair sample
