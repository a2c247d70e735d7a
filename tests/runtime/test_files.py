"""Files exist whole or not at all."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from eqat_mm.runtime.files import (
    UNFINISHED,
    append_jsonl,
    atomic_path,
    checksum_of,
    fingerprint_of,
    read_json,
    sha256_of,
    write_json,
)


def test_a_file_appears_with_its_folder(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "file.txt"
    with atomic_path(path) as temporary:
        temporary.write_text("whole")
        assert temporary.parent == path.parent
        assert not path.exists()
    assert path.read_text() == "whole"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_failure_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    def fail() -> None:
        with atomic_path(tmp_path / "file.txt") as temporary:
            temporary.write_text("half")
            raise error

    with pytest.raises(error):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_a_failure_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "value.json"
    write_json(path, {"old": 1})
    with pytest.raises(TypeError):
        write_json(path, {"new": object()})
    assert read_json(path) == {"old": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_two_that_write_one_file_do_not_share_the_temporary_one(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    with atomic_path(path) as first, atomic_path(path) as second:
        assert first != second
        assert first.match(UNFINISHED)
        first.write_text("first")
        second.write_text("second")
    assert path.read_text() == "first"  # whole, and the last one to be renamed
    assert list(tmp_path.iterdir()) == [path]


def test_numbers_that_json_lacks_are_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nan"):
        write_json(tmp_path / "value.json", {"loss": float("nan")})
    assert list(tmp_path.iterdir()) == []


def test_a_checksum_notices_a_bit_and_a_length(tmp_path: Path) -> None:
    path = tmp_path / "numbers.bin"
    content = bytearray(bytes(range(256)) * 2**17)  # four chunks
    path.write_bytes(content)
    first = checksum_of(path)
    assert checksum_of(path) == first
    content[2**24] ^= 1
    path.write_bytes(content)
    assert checksum_of(path) != first
    content[2**24] ^= 1
    path.write_bytes(content + b"x")
    assert checksum_of(path) != first


def test_a_fingerprint_is_of_names_and_contents(tmp_path: Path) -> None:
    small, large = tmp_path / "config.json", tmp_path / "model.safetensors"
    small.write_text("{}")
    content = bytearray(2**23)
    large.write_bytes(content)
    first = fingerprint_of([small, large])
    assert fingerprint_of([large, small]) == first
    for at in (0, 2**22, 2**23 - 1):  # first and last bytes, and one of the places between
        place = at if at != 2**22 else (2**23 - 2**16) * 31 // 63
        content[place] ^= 1
        large.write_bytes(content)
        assert fingerprint_of([small, large]) != first
        content[place] ^= 1
    large.write_bytes(content)
    assert fingerprint_of([small, large]) == first
    small.write_text("{ }")
    assert fingerprint_of([small, large]) != first


def test_json_is_readable_by_people(tmp_path: Path) -> None:
    write_json(tmp_path / "value.json", {"name": "Überblick", "list": [1]})
    text = (tmp_path / "value.json").read_text(encoding="utf-8")
    assert text == '{\n  "name": "Überblick",\n  "list": [\n    1\n  ]\n}\n'
    assert read_json(tmp_path / "value.json") == {"name": "Überblick", "list": [1]}


def test_records_are_appended_as_lines(tmp_path: Path) -> None:
    path = tmp_path / "run" / "metrics.jsonl"
    append_jsonl(path, {"block": 0})
    append_jsonl(path, {"block": 1})
    assert [json.loads(line) for line in path.read_text().splitlines()] == [{"block": 0}, {"block": 1}]


def test_the_digest_is_that_of_the_bytes(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"bytes")
    assert sha256_of(tmp_path / "file") == hashlib.sha256(b"bytes").hexdigest()
