"""Large texts: every part has its own documents, and no more is read than is drawn."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pyarrow as arrow
import pytest
import zstandard
from pyarrow import parquet

from eqat_mm.data.text import documents as module
from eqat_mm.data.text import files as text_files
from eqat_mm.data.text import parts as parts_module
from eqat_mm.data.text.documents import drawn_documents, load_documents
from eqat_mm.data.text.parts import drawn
from eqat_mm.errors import ConfigError, DataError

TEXTS = [f"document {number} " + "x" * (number * 37 % 400) for number in range(500)]
LINES = "".join(json.dumps({"content": text, "id": number}) + "\n" for number, text in enumerate(TEXTS)).encode()
GAPS = "\n\n\n".join(TEXTS).encode()


def save_parquet(path: Path) -> None:
    parquet.write_table(arrow.table({"id": range(len(TEXTS)), "content": TEXTS}), path, row_group_size=60)


WRITERS: dict[str, Callable[[Path], object]] = {
    "a.jsonl": lambda path: path.write_bytes(LINES),
    "a.json": lambda path: path.write_bytes(LINES),
    "a.jsonl.gz": lambda path: path.write_bytes(gzip.compress(LINES)),
    "a.json.gz": lambda path: path.write_bytes(gzip.compress(LINES[:9000]) + gzip.compress(LINES[9000:])),
    "a.jsonl.zst": lambda path: path.write_bytes(zstandard.compress(LINES)),
    "A.JSON.ZST": lambda path: path.write_bytes(zstandard.compress(LINES[:999]) + zstandard.compress(LINES[999:])),
    "a.txt": lambda path: path.write_bytes(GAPS),
    "a.txt.gz": lambda path: path.write_bytes(gzip.compress(GAPS)),
    "a.parquet": save_parquet,
}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let everything count as large, in parts of 4 kB."""
    monkeypatch.setattr(module, "_WHOLE", 0)
    monkeypatch.setattr(parts_module, "STRETCH", 4096)


@pytest.mark.parametrize("name", WRITERS)
def test_every_kind_of_file_is_read_whole(tmp_path: Path, name: str) -> None:
    WRITERS[name](tmp_path / name)
    assert load_documents(str(tmp_path / name), "content") == [text.strip() for text in TEXTS]
    assert load_documents(str(tmp_path), "content") == [text.strip() for text in TEXTS]


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("name", WRITERS)
def test_parts_have_every_document_once(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    WRITERS[name](tmp_path / name)
    stream = drawn_documents(str(tmp_path), "content", 0)
    assert stream is not None
    found = Counter(stream)
    assert max(found.values()) == 1
    missing = {text.strip() for text in TEXTS} - set(found)
    assert set(found) <= {text.strip() for text in TEXTS}
    assert len(missing) <= (len(GAPS) // 4096 if name == "a.txt" else 0)  # a gap on the border of two parts
    assert "1 files, " in capsys.readouterr().out


@pytest.mark.usefixtures("small")
def test_the_draw_follows_the_seed_and_nothing_else(tmp_path: Path) -> None:
    for number in range(3):
        WRITERS["a.jsonl"](tmp_path / f"{number}.jsonl")
    first, again, other = (list(drawn_documents(str(tmp_path), "content", seed) or ()) for seed in (1, 1, 2))
    assert first == again
    assert first[:20] != other[:20]
    assert sorted(first) == sorted(other)


@pytest.mark.usefixtures("small")
def test_no_more_is_read_than_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(40):
        (tmp_path / f"{number}.jsonl").write_bytes(LINES)
    read = Counter[Path]()
    lines_of = text_files._lines

    def counted(file: object, path: Path, start: int) -> object:
        for line in lines_of(file, path, start):  # type: ignore[arg-type]
            read[path] += len(line[2])
            yield line

    monkeypatch.setattr(text_files, "_lines", counted)
    stream = drawn_documents(str(tmp_path), "content", 0)
    assert stream is not None
    taken = [next(stream) for _ in range(100)]
    assert len(set(taken)) > 70
    assert read.total() < 120 * len(LINES) // len(TEXTS) < 40 * len(LINES) // 100
    assert len(read) > 8


def test_a_small_text_is_not_drawn_from(tmp_path: Path) -> None:
    WRITERS["a.jsonl"](tmp_path / "a.jsonl")
    assert drawn_documents(str(tmp_path), "content", 0) is None
    assert drawn_documents("demo-wikipedia", "text", 0) is None


@pytest.mark.usefixtures("small")
def test_a_book_without_gaps_is_not_read_from_every_part(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("word " * 20_000 + "\n" + "line of words\n" * 300_000, encoding="utf-8")
    (only,) = list(drawn_documents(str(tmp_path / "book.txt"), "text", 0) or ())
    assert len(only) < 2**20 + 1


def test_json_beside_text_describes_it(tmp_path: Path) -> None:
    (tmp_path / "dataset_info.json").write_text("{}", encoding="utf-8")
    (tmp_path / "a.txt").write_text("one", encoding="utf-8")
    assert load_documents(str(tmp_path)) == ["one"]


def test_shards_that_end_give_way_to_others() -> None:
    parts = [lambda number=number: iter([f"{number}-{index}" for index in range(number % 3)]) for number in range(60)]
    assert sorted(drawn(parts, 0)) == sorted(f"{number}-{index}" for number in range(60) for index in range(number % 3))
    assert list(drawn([], 0)) == []


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    ("name", "data", "given"),
    [
        ("a.jsonl.gz", b"not gzip", "gzip"),
        ("a.jsonl.gz", gzip.compress(LINES)[:500], "end-of-stream"),
        ("a.jsonl.zst", b"not zstandard at all", "Zstd"),
        ("a.jsonl", LINES + b"{", "not JSON"),
        ("a.jsonl", b'{"text": "a"}\n', "the fields text"),
        ("a.parquet", b"PAR1", "parquet"),
        ("a.parquet.gz", b"PAR1", ".gz"),
        ("a.csv.gz", b"", ".gz"),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, name: str, data: bytes, given: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError) as raised:
        list(drawn_documents(str(tmp_path / name), "content", 0) or ())
    assert name in raised.value.where
    assert given.lower() in raised.value.given.lower()
    with pytest.raises(DataError, match=name):
        load_documents(str(tmp_path / name), "content")


def test_without_zstandard_the_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    WRITERS["a.jsonl.zst"](tmp_path / "a.jsonl.zst")
    monkeypatch.setitem(__import__("sys").modules, "zstandard", None)
    with pytest.raises(ConfigError, match="pip install zstandard"):
        load_documents(str(tmp_path), "content")
