"""Records of several processes: half lines do not count, and one file comes of them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from eqat_mm.data.generated.record_parts import RecordFile, locked, parts_folder, read_parts, write_records
from eqat_mm.data.text.files import read_text_file
from eqat_mm.errors import DataError

COUNT = 1000


def record(index: int) -> dict[str, Any]:
    return {"text": f"ä line\u2028 of {index}\n", "index": index}


def test_parts_are_read_in_the_order_of_their_indices(tmp_path: Path) -> None:
    for name, indices in (("1-of-2", [4, 0]), ("2-of-2", [3, 1])):
        part = RecordFile(tmp_path, name)
        for index in indices:
            part.add(record(index))
    assert list(read_parts(tmp_path, COUNT).items()) == [(index, record(index)) for index in (0, 1, 3, 4)]
    assert read_parts(tmp_path / "nowhere", COUNT) == {}


def test_half_a_line_does_not_count_and_spoils_nothing(tmp_path: Path) -> None:
    RecordFile(tmp_path, "one").add(record(0))
    file = tmp_path / "one.jsonl"
    RecordFile(tmp_path, "two").add(record(1))
    whole = (tmp_path / "two.jsonl").read_bytes()
    for cut in (1, 11, len(whole) - 1):  # 11: within the bytes of a character
        with file.open("ab") as opened:
            opened.write(whole[:cut])
        (tmp_path / "two.jsonl").unlink(missing_ok=True)
        part = RecordFile(tmp_path, "one")
        part.add(record(cut + 10))
        assert {0, cut + 10} <= read_parts(tmp_path, COUNT).keys()
        assert read_parts(tmp_path, COUNT)[cut + 10] == record(cut + 10)


def line_of(folder: Path, index: int) -> bytes:
    RecordFile(folder, "line").add(record(index))
    return (folder / "line.jsonl").read_bytes()


@pytest.mark.parametrize("spoil", ["text", "index", "no checksum", "no index", "a list", "a number"])
def test_a_line_that_is_not_as_it_was_written_is_named(tmp_path: Path, spoil: str) -> None:
    line = line_of(tmp_path, 7)
    whole = json.loads(line)
    spoilt = {
        "text": line.replace(b"line", b"lime"),
        "index": line.replace(b'"index": 7', b'"index": 8'),
        "no checksum": json.dumps({name: value for name, value in whole.items() if name != "checksum"}).encode(),
        "no index": json.dumps({name: value for name, value in whole.items() if name != "index"}).encode(),
        "a list": b"[]",
        "a number": b"9" * 10,
    }[spoil]
    assert spoilt != line
    (tmp_path / "line.jsonl").write_bytes(line + spoilt + b"\n")
    with pytest.raises(DataError) as caught:
        read_parts(tmp_path, COUNT)
    assert caught.value.where == f"{tmp_path / 'line.jsonl'}, line 2"


@pytest.mark.parametrize("index", [-1, COUNT, 1.5, "7", None])
def test_an_index_that_cannot_be_is_named(tmp_path: Path, index: Any) -> None:
    RecordFile(tmp_path, "one").add({"text": "a", "index": index})
    with pytest.raises(DataError, match=r"one\.jsonl, line 1"):
        read_parts(tmp_path, COUNT)


def test_two_records_of_one_index_must_be_the_same(tmp_path: Path) -> None:
    for name in ("one", "two"):
        RecordFile(tmp_path, name).add(record(3))
    assert read_parts(tmp_path, COUNT) == {3: record(3)}
    RecordFile(tmp_path, "zzz").add({**record(3), "text": "another"})
    with pytest.raises(DataError, match=r"zzz\.jsonl, line 1"):
        read_parts(tmp_path, COUNT)


def test_what_a_power_cut_leaves_does_not_count(tmp_path: Path) -> None:
    file = tmp_path / "one.jsonl"
    file.write_bytes(line_of(tmp_path, 1) + b"\0" * 4096)
    (tmp_path / "line.jsonl").unlink()
    assert read_parts(tmp_path, COUNT) == {1: record(1)}
    RecordFile(tmp_path, "one").add(record(2))
    assert read_parts(tmp_path, COUNT) == {index: record(index) for index in (1, 2)}


def test_a_part_that_is_no_file_is_named(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(DataError, match=r"pipe\.jsonl"):
        read_parts(tmp_path, COUNT)


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_one_file_that_is_read_as_text(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"texts{suffix}"
    write_records(path, [record(0), record(1)])
    assert read_text_file(path) == [record(0)["text"].strip(), record(1)["text"].strip()]
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_the_folder_is_hidden_and_locked(tmp_path: Path) -> None:
    folder = parts_folder(tmp_path / "texts.jsonl")
    assert folder.parent == tmp_path
    assert folder.name.startswith(".")
    with locked(folder):
        assert folder.is_dir()
