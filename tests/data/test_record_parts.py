"""Records of several processes: half lines do not count, and one file comes of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from eqat_mm.data.record_parts import Part, locked, parts_folder, read_parts, write_records
from eqat_mm.data.text_files import read_text_file


def record(index: int) -> dict[str, Any]:
    return {"text": f"ä line\u2028 of {index}\n", "index": index}


def test_parts_are_read_in_the_order_of_their_indices(tmp_path: Path) -> None:
    for name, indices in (("1-of-2", [4, 0]), ("2-of-2", [3, 1])):
        part = Part(tmp_path, name)
        for index in indices:
            part.add(record(index))
    assert list(read_parts(tmp_path).items()) == [(index, record(index)) for index in (0, 1, 3, 4)]
    assert read_parts(tmp_path / "nowhere") == {}


def test_half_a_line_does_not_count_and_spoils_nothing(tmp_path: Path) -> None:
    Part(tmp_path, "one").add(record(0))
    file = tmp_path / "one.jsonl"
    Part(tmp_path, "two").add(record(1))
    whole = (tmp_path / "two.jsonl").read_bytes()
    for cut in (1, 11, len(whole) - 1):  # 11: within the bytes of a character
        with file.open("ab") as opened:
            opened.write(whole[:cut])
        (tmp_path / "two.jsonl").unlink(missing_ok=True)
        part = Part(tmp_path, "one")
        part.add(record(cut + 10))
        assert {0, cut + 10} <= read_parts(tmp_path).keys()
        assert read_parts(tmp_path)[cut + 10] == record(cut + 10)


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
