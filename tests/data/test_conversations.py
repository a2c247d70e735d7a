"""LLaVA's format is read from files and data sets; every fault of a record has its message."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

import datasets
import pyarrow as arrow
import pytest
from PIL import Image

from eqat_mm.data.image_text.conversations import (
    FIRST_BY_MODEL,
    IMAGE_IS_TEXT,
    IMAGE_NOT_SHOWN,
    IMAGE_REPEATED,
    Turn,
)
from eqat_mm.data.image_text.images import ImageFile, TableImage
from eqat_mm.data.image_text.problems import BadSample
from eqat_mm.errors import DataError
from tests.data.records import read_records


def human(value: Any) -> dict[str, Any]:
    return {"from": "human", "value": value}


def gpt(value: Any) -> dict[str, Any]:
    return {"from": "gpt", "value": value}


GOOD = {"id": 7, "image": "b/a.png", "conversations": [human("<image>\nwhat?\n"), gpt(" a cat ")]}
TEXT = {"id": "8", "conversations": [human("hello"), gpt("hi"), human("bye"), gpt("bye")]}


def _write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def _jsonl(*records: Any) -> str:
    return "\n\n".join(json.dumps(record) for record in records)


@pytest.mark.parametrize(
    ("name", "text", "where"),
    [("a.json", json.dumps([GOOD, TEXT]), "record 1"), ("a.jsonl", _jsonl(GOOD, TEXT), "line 3")],
    ids=["json", "jsonl"],
)
def test_files_of_records(tmp_path: Path, name: str, text: str, where: str) -> None:
    records = read_records(_write(tmp_path / name, "\ufeff" + text))
    assert len(records) == 2
    first, second = records.conversation(0), records.conversation(1)
    assert first.turns == (Turn("user", "<image>\nwhat?\n"), Turn("assistant", " a cat "))
    assert first.images == (ImageFile(tmp_path / "b" / "a.png"),)
    assert [turn.role for turn in second.turns] == ["user", "assistant"] * 2
    assert second.images == ()
    assert second.where == records.where(1) == f"{tmp_path / name}, {where}"


def test_several_images_and_a_folder_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    record = {
        "image": ["a.png", "b.png"],
        "conversations": [human("<image> or"), gpt("no"), human("<image>"), gpt("x")],
    }
    records = read_records(_write(tmp_path / "a.json", json.dumps([record])), tmp_path / "images")
    assert records.conversation(0).images == tuple(ImageFile(tmp_path / "images" / name) for name in ("a.png", "b.png"))


def test_other_names_of_speakers(tmp_path: Path) -> None:
    turns = [{"from": name, "value": name} for name in ("system", "user", "assistant")]
    records = read_records(_write(tmp_path / "a.json", json.dumps([{"image": None, "conversations": turns}])))
    assert [turn.role for turn in records.conversation(0).turns] == ["system", "user", "assistant"]


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        ("text", "a JSON str instead of an object"),
        ({"id": 1}, "no list of turns"),
        ({"conversations": []}, "no list of turns"),
        ({"conversations": ["hello"]}, "turn 1 has not the two strings"),
        ({"conversations": [human("a"), gpt(None)]}, "turn 2 has not the two strings"),
        ({"conversations": [human("a"), {"from": "bing", "value": "b"}]}, "unknown speaker 'bing' in turn 2"),
        ({"conversations": [human("a"), gpt(" \n")]}, "empty answer in turn 2"),
        ({"conversations": [human(""), gpt("b")]}, "empty text in turn 1"),
        ({"conversations": [gpt("a"), gpt("b"), human("c"), gpt("d")]}, "turn 2 is the assistant's"),
        ({"conversations": [gpt("a")]}, "no answer to the last turn"),
        ({"conversations": [{"from": "system", "value": "a"}]}, "no answer to the last turn"),
        ({"conversations": [human("a"), human("b"), gpt("c")]}, "turn 2 is the user's"),
        ({"conversations": [human("a"), gpt("b"), human("c")]}, "no answer to the last turn"),
        ({"conversations": [human("<image>"), gpt("b <image>")], "image": "a.png"}, "<image> in turn 2"),
        ({"conversations": [human("a \ud83d"), gpt("b")]}, "turn 1 holds text that is not Unicode"),
        (
            {"conversations": [human("<image>"), gpt("b"), human("<image>"), gpt("b")], "image": ["a.png"]},
            "2 <image> in the text for 1 images",
        ),
        ({"conversations": [human("<image>"), gpt("b")], "image": ["a.png"] * 2}, "1 <image> in the text for 2 images"),
        (
            {"conversations": [human("<image>" * 3), gpt("b")], "image": ["a.png"] * 2},
            "3 <image> in the text for 2 images",
        ),
        ({"conversations": [human("<image>"), gpt("b")], "image": "../a.png"}, "leaves the image folder"),
        ({"conversations": [human("<image>"), gpt("b")], "image": 5}, "image is 5, not a path"),
        ({"conversations": [human("<image>"), gpt("b")], "image": [""]}, "image is '', not a path"),
        ({"conversations": [human("<image>"), gpt("b")], "image": {"bytes": "x"}}, "image is a dict, not a path"),
        ({"conversations": [human("<image>"), gpt("b")], "image": {"path": "/a.png"}}, "image is a dict, not a path"),
        ({"conversations": [human("<image>"), gpt("b")], "image": [["a.png"]]}, "image is a list, not a path"),
        ({"conversations": [human("a"), {"from": ["gpt"], "value": "b"}]}, "turn 2 has not the two strings"),
    ],
    ids=str,
)
def test_each_fault_of_a_record(tmp_path: Path, record: Any, problem: str) -> None:
    records = read_records(_write(tmp_path / "a.json", json.dumps([record])))
    with pytest.raises(BadSample) as caught:
        records.conversation(0)
    assert problem in str(caught.value)


@pytest.mark.parametrize(
    ("record", "texts", "images", "mended"),
    [
        ({"conversations": [gpt(""), human("b"), gpt("c")]}, ["b", "c"], 0, FIRST_BY_MODEL),
        (
            {"conversations": [{"from": "system", "value": "s"}, gpt("a"), human("b"), gpt("c")]},
            ["s", "b", "c"],
            0,
            FIRST_BY_MODEL,
        ),
        (
            {"conversations": [human("<image>\n<image> b <image>"), gpt("c")], "image": "a.png"},
            ["<image>\n b ", "c"],
            1,
            IMAGE_REPEATED,
        ),
        (
            {"conversations": [human("a <image>"), gpt("<image> b")]},
            ["a <image>", "<image> b"],
            0,
            IMAGE_IS_TEXT,
        ),
        ({"conversations": [human("a"), gpt("b")], "image": "a.png"}, ["a", "b"], 0, IMAGE_NOT_SHOWN),
    ],
    ids=str,
)
def test_what_published_data_have_is_taken_as_llava_takes_it(
    tmp_path: Path, record: Any, texts: list[str], images: int, mended: str
) -> None:
    found = read_records(_write(tmp_path / "a.json", json.dumps([record]))).conversation(0)
    assert [turn.text.strip() for turn in found.turns] == [text.strip() for text in texts]
    assert found.images == (ImageFile(tmp_path / "a.png"),) * images
    assert found.mended == (mended,)


@pytest.mark.parametrize(
    ("name", "text", "where", "given"),
    [
        ("a.json", "[", "a.json", "not JSON"),
        ("a.json", "[" * 100_000, "a.json", "nested too deep"),
        ("a.json", "[" + "1" * 5000 + "]", "a.json", "not JSON"),
        ("a.json", "[{}\n {}]", "a.json", "Expecting ',' delimiter at byte 5, in line 2"),
        ("a.json", "[{}] x", "a.json", "Extra data at byte 5"),
        ("a.json", "", "a.json", "an empty file"),
        ("a.jsonl", "{}\n" + '{"a":' * 100_000, "a.jsonl, line 2", "nested too deep"),
        ("a.json", '{"a": 1}', "a.json", "no list: it begins with '{"),
        ("a.jsonl", '{"a": 1}\n\n{"a"', "a.jsonl, line 3", "not JSON"),
        ("a.csv", "a,b", "a.csv", "a file of type .csv"),
    ],
)
def test_a_faulty_file_is_named(tmp_path: Path, name: str, text: str, where: str, given: str) -> None:
    with pytest.raises(DataError) as caught:
        read_records(_write(tmp_path / name, text))
    assert caught.value.where == str(tmp_path / where)
    assert given in caught.value.given


def test_text_in_another_encoding_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes('["ä"]'.encode("latin-1"))
    with pytest.raises(DataError, match="can't decode"):
        read_records(str(tmp_path / "a.json"))


def test_missing_files_and_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        read_records(str(tmp_path / "a.json"))
    with pytest.raises(DataError, match="no such folder"):
        read_records(_write(tmp_path / "b.json", json.dumps([TEXT])), tmp_path / "images")


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_a_pipe_is_not_opened(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises(DataError, match="a pipe, a socket or a device"):
        read_records(str(tmp_path / name))


def _png(colour: str) -> dict[str, Any]:
    buffer = io.BytesIO()
    Image.new("RGB", (2, 3), colour).save(buffer, "png")
    return {"bytes": buffer.getvalue(), "path": None}


def _hub(monkeypatch: pytest.MonkeyPatch, columns: dict[str, Any], image: Any) -> None:
    feature = {} if image is None else {"image": image}
    turns = datasets.List({"from": datasets.Value("string"), "value": datasets.Value("string")})
    features = datasets.Features({"id": datasets.Value("string"), "conversations": turns, **feature})
    table = datasets.Dataset.from_dict(columns, features=features)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: table)


def test_a_data_set_with_images_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    columns = {
        "id": ["a", "b"],
        "conversations": [[human("<image> what?"), gpt("red")], [human("hello"), gpt("hi")]],
        "image": [_png("red"), None],
    }
    _hub(monkeypatch, columns, datasets.Image())
    records = read_records("hf:name")
    (image,) = records.conversation(0).images
    assert isinstance(image, TableImage)
    assert Image.open(image.file()).size == (2, 3)
    assert records.conversation(1).images == ()
    assert records.where(1) == "hf:name, row 1"


def test_a_data_set_with_lists_of_images(monkeypatch: pytest.MonkeyPatch) -> None:
    columns = {
        "id": ["a"],
        "conversations": [[human("<image> or <image>?"), gpt("red")]],
        "image": [[_png("red"), _png("blue")]],
    }
    _hub(monkeypatch, columns, datasets.List(datasets.Image()))
    images = read_records("hf:name").conversation(0).images
    assert [Image.open(image.file()).getpixel((0, 0)) for image in images] == [(255, 0, 0), (0, 0, 255)]


def test_a_data_set_with_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    columns = {"id": ["a"], "conversations": [[human("<image>"), gpt("red")]], "image": ["a.png"]}
    _hub(monkeypatch, columns, datasets.Value("string"))
    assert read_records("hf:name", tmp_path).conversation(0).images == (ImageFile(tmp_path / "a.png"),)


def test_a_file_that_the_library_keeps_is_opened_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(tmp_path / "a.png")
    columns = {"id": ["a"], "conversations": [[human("<image>"), gpt("red")]], "image": [path]}
    _hub(monkeypatch, columns, datasets.Image())
    assert read_records("hf:name").conversation(0).images == (ImageFile(Path(path)),)
    columns["image"] = [{"path": path}]
    _hub(monkeypatch, columns, {"path": datasets.Value("string")})
    with pytest.raises(BadSample, match="without bytes"):
        read_records("hf:name").conversation(0)


def test_a_row_that_is_not_utf8_is_a_bad_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = arrow.Array.from_buffers(
        arrow.string(), 1, [None, arrow.py_buffer(b"\0\0\0\0\1\0\0\0"), arrow.py_buffer(b"\xff")]
    )
    table = datasets.Dataset(arrow.table({"conversations": [[human("a"), gpt("b")]], "image": broken}))
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: table)
    with pytest.raises(BadSample, match="UnicodeDecodeError"):
        read_records("hf:name").conversation(0)


def test_a_data_set_of_another_format_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_dict({"text": ["a"]}))
    with pytest.raises(DataError, match="the columns text"):
        read_records("hf:name")
