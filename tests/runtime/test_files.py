"""Files exist whole or not at all."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from eqat_mm.runtime.files import append_jsonl, atomic_path, read_json, sha256_of, write_json, write_text


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


def test_a_leftover_of_a_killed_process_is_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    with atomic_path(path) as temporary:
        temporary.write_text("x")
        name = temporary.name
    (tmp_path / name).write_text("left by another")
    write_text(path, "new")
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


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
