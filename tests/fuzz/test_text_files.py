"""Texts in any bytes, JSON, tables and names: documents, or an error of ours."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as arrow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from eqat_mm.data.text import documents as module
from eqat_mm.data.text.documents import load_documents
from tests.fuzz.allowed import only_our_errors
from tests.fuzz.damage import damaged
from tests.fuzz.values import json_texts, json_values, words

_TEXT = "one\n\n\ntwo €\r\n\r\n\r\n日本語\n"
_LINES = "".join(json.dumps({"text": text, "id": 7}, ensure_ascii=False) + "\n" for text in _TEXT.split())


def _parquet(table: arrow.Table, **options: Any) -> bytes:
    buffer = io.BytesIO()
    parquet.write_table(table, buffer, **options)
    return buffer.getvalue()


_TABLES = [
    _parquet(arrow.table({"id": [1, 2, 3], "text": arrow.array(["a" * 99, None, "zwei €"]).cast(kind)}), **options)
    for kind in (arrow.string(), arrow.large_string(), arrow.dictionary("int32", "string"), arrow.binary())
    for options in ({}, {"compression": "zstd", "data_page_version": "2.0"}, {"compression": "gzip"})
]


@given(
    data=st.binary() | damaged(st.just(_TEXT.encode())) | words.map(lambda text: text.encode(errors="surrogatepass"))
)
def test_plain_text(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.txt"
    path.write_bytes(data)
    with only_our_errors():
        assert all(document.strip() == document != "" for document in load_documents(str(path)))


@given(
    data=st.lists(
        json_texts
        | json_values.map(lambda value: json.dumps({"text": value}))
        | words.map(lambda text: json.dumps({"text": text, text: 1})),
        max_size=4,
    ).map(lambda lines: "\n".join(lines).encode(errors="surrogatepass"))
    | damaged(st.just(_LINES.encode()))
)
def test_json_lines(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.jsonl"
    path.write_bytes(data)
    with only_our_errors():
        assert all(document.strip() == document != "" for document in load_documents(str(path)))


@given(data=damaged(st.sampled_from(_TABLES)) | st.binary())
def test_parquet(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.parquet"
    path.write_bytes(data)
    with only_our_errors():
        load_documents(str(path))


def _broken(kind: Any, data: bytes) -> arrow.Array:
    width = 8 if kind == arrow.large_string() else 4
    offsets = b"".join(value.to_bytes(width, "little") for value in (0, len(data) // 2, len(data)))
    return arrow.Array.from_buffers(kind, 2, [None, arrow.py_buffer(offsets), arrow.py_buffer(data)])


_columns = st.one_of(
    st.builds(_broken, st.sampled_from([arrow.string(), arrow.large_string()]), st.binary(max_size=8)),
    st.lists(st.none() | st.text(max_size=5), min_size=2, max_size=2),
    st.sampled_from(
        [
            [1, 2],
            [1.5, None],
            [b"\xff", b"a"],
            [["a"], []],
            [{"text": "a"}, None],
            [None, None],
            arrow.array([0, 2**62], arrow.timestamp("ns", "Nowhere/City")),
            arrow.array([1, 2], arrow.duration("s")),
            arrow.array([1, 2], arrow.date64()),
            arrow.array(["a", "b"], arrow.string_view()),
            arrow.array([b"a", b"\xff"], arrow.binary_view()),
            arrow.array(["a", None]).dictionary_encode(),
            arrow.array([[("a", 1)], []], arrow.map_("string", "int8")),
        ]
    ),
)
_names = st.sampled_from(["text", "text", "Text", "", "id"]) | st.text(max_size=4)


@given(columns=st.lists(st.tuples(_names, _columns), max_size=3))
def test_tables_of_odd_types(tmp_path_factory: pytest.TempPathFactory, columns: list[tuple[str, Any]]) -> None:
    table = arrow.table([values for _, values in columns], names=[name for name, _ in columns])
    path = tmp_path_factory.getbasetemp() / "odd.parquet"
    try:
        parquet.write_table(table, path)
    except arrow.ArrowException:  # parquet knows no such type
        return
    with only_our_errors():
        load_documents(str(path))


@given(columns=st.dictionaries(_names, _columns, max_size=3))
def test_data_sets_of_odd_types(columns: dict[str, Any]) -> None:
    try:
        table = datasets.Dataset(arrow.table(columns))
    except (ValueError, KeyError, NotImplementedError):  # the library knows no such type
        return
    with pytest.MonkeyPatch.context() as patch, only_our_errors():
        patch.setattr(module, "load_hub", lambda source: table)
        load_documents("hf:name")


_sources = st.one_of(
    words,
    words.map(lambda text: text + ".jsonl"),
    st.builds(str.__add__, st.sampled_from(["hf:", "~", "/dev/zero", "a" * 300]), words),
    st.sampled_from(["/dev/stdin", "/dev/zero", "/proc/self/mem", "/etc/\0", "~nobody", "hf:", "hf::", "hf:a:b:c:d"]),
)


@given(source=_sources.filter(lambda source: source.strip("/.")))  # not the whole disk
def test_odd_names(tmp_path_factory: pytest.TempPathFactory, source: str) -> None:
    folder = tmp_path_factory.getbasetemp() / "empty"
    folder.mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as patch, only_our_errors():
        patch.chdir(folder)
        patch.setenv("HOME", str(folder))
        patch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_dict({"text": ["a"]}))
        load_documents(source)


def test_a_file_in_a_folder_may_have_any_name(tmp_path: Path) -> None:
    (tmp_path / "a\udcff.txt").write_text("one")
    (tmp_path / "b\udcff.jsonl").write_text("no")
    assert load_documents(str(tmp_path / "a\udcff.txt")) == ["one"]
    with only_our_errors():
        load_documents(str(tmp_path))
