"""Records are found where they are, in whatever pieces a file is read; what is no JSON is named by its place."""

from __future__ import annotations

import codecs
import json
import pickle
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eqat_mm.data.image_text import record_files as module
from eqat_mm.data.image_text.problems import BadSample
from eqat_mm.data.image_text.record_files import FileRows, places_in
from eqat_mm.errors import DataError

_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)
_blank = st.text(" \t\r\n", max_size=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("records")


def rows(path: Path) -> list[Any]:
    found = FileRows(path, places_in(path))
    return [found[index] for index in range(len(found))]


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(
    values=st.lists(_values, max_size=4),
    ascii_only=st.booleans(),
    indent=st.sampled_from([None, 1]),
    marked=st.booleans(),
    blank=_blank,
    piece=st.sampled_from([4, 7, 64, 2**22]),
)
def test_any_list_is_read_in_any_pieces(
    folder: Path, values: list[Any], ascii_only: bool, indent: Any, marked: bool, blank: str, piece: int
) -> None:
    mark = codecs.BOM_UTF8 if marked else b""
    text = json.dumps(values, ensure_ascii=ascii_only, indent=indent)
    lines = "\n\n".join(json.dumps(value, ensure_ascii=ascii_only) for value in values)
    (folder / "a.json").write_bytes(mark + (blank + text + blank).encode())
    (folder / "a.jsonl").write_bytes(mark + lines.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_PIECE", piece)
        patch.setattr(module, "_SHORT", 2**40)
        assert rows(folder / "a.json") == values
        assert rows(folder / "a.jsonl") == values
        assert places_in(folder / "a.jsonl").numbers.tolist() == [1 + 2 * index for index in range(len(values))]


@pytest.mark.parametrize("piece", [5, 2**22])
@pytest.mark.parametrize(
    ("text", "given"),
    [
        ("[1,2", "Expecting ',' delimiter at byte 4"),
        ("[1,]", "Expecting value at byte 3"),
        ("[\n\n1 2]", "Expecting ',' delimiter at byte 5, in line 3"),
        ("[", "Expecting value at byte 1"),
        ("[true, nul]", "Expecting value at byte 7"),
        ('["ä", "abc', "Unterminated string starting at byte 7"),
        ('["\x01"]', "Invalid control character at byte 2"),
        ("[,1]", "Expecting value at byte 1"),
        ("[[]]]", "Extra data at byte 4"),
    ],
    ids=ascii,
)
def test_what_is_no_json_is_named_by_its_place(
    folder: Path, monkeypatch: pytest.MonkeyPatch, text: str, given: str, piece: int
) -> None:
    monkeypatch.setattr(module, "_PIECE", piece)
    (folder / "b.json").write_text(text, encoding="utf-8")
    with pytest.raises(DataError) as caught:
        places_in(folder / "b.json")
    assert given in caught.value.given


def test_what_is_not_utf8_is_named_by_its_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PIECE", 8)
    (folder / "c.json").write_bytes(b'[{"a": 1},\n {"b": 2},\n {"c": "\xff"}]')
    with pytest.raises(DataError, match="can't decode") as caught:
        places_in(folder / "c.json")
    assert caught.value.where == f"{folder / 'c.json'}, line 3"


def test_a_file_with_one_record_a_line_is_told_apart(folder: Path) -> None:
    (folder / "d.json").write_text('{"a": 1}\n{"a": 2}\n')
    with pytest.raises(DataError, match="begins with") as caught:
        places_in(folder / "d.json")
    assert "named .jsonl" in caught.value.do


def test_a_large_file_is_not_held(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PIECE", 2**16)
    record = {"conversations": ["ä word " * 20] * 10}
    (folder / "e.json").write_text(json.dumps([record] * 4000), encoding="utf-8")
    size = (folder / "e.json").stat().st_size
    tracemalloc.start()
    places = places_in(folder / "e.json")
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(places.starts) == 4000
    assert most < size / 5
    assert FileRows(folder / "e.json", places)[3999] == record


def test_records_can_be_sent_and_a_changed_file_is_noticed(folder: Path) -> None:
    path = folder / "f.json"
    path.write_text('[{"a": 1}, {"a": 2}]')
    found = FileRows(path, places_in(path))
    assert found[1] == {"a": 2}
    assert pickle.loads(pickle.dumps(found))[1] == {"a": 2}
    path.write_text('[{"a": 1}]')
    with pytest.raises(BadSample, match="has changed"):
        found[1]
