"""Disk and memory are asked before a job starts."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from eqat_mm.errors import ResourceError
from eqat_mm.runtime import room
from eqat_mm.runtime.room import require_disk, require_memory, require_writable
from tests.checkpoint.files import assert_four_lines


def test_disk_space_is_asked_where_the_folder_will_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Path] = []

    def disk_usage(path: Path) -> SimpleNamespace:
        asked.append(path)
        return SimpleNamespace(free=3 * 2**30)

    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    require_disk(tmp_path / "not" / "yet", 3 * 2**30, "activation streams")
    assert asked == [tmp_path]


def test_too_little_disk_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2**30))
    with pytest.raises(ResourceError) as caught:
        require_disk(tmp_path, 2**30 + 2**29, "activation streams")
    assert "activation streams" in caught.value.where
    assert caught.value.given == "1.00 GiB free"
    assert "1.50 GiB" in caught.value.allowed


def test_too_little_memory_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "available_bytes", lambda: 2**30)
    require_memory(2**30, "activation streams")
    with pytest.raises(ResourceError) as caught:
        require_memory(2**30 + 2**29, "activation streams")
    assert_four_lines(caught.value)
    assert "activation streams" in caught.value.where
    assert caught.value.given == "1.00 GiB available"
    assert "1.50 GiB" in caught.value.allowed
    assert "--spool disk" in caught.value.do


def test_a_place_that_is_a_file_or_read_only_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    require_writable(tmp_path / "a" / "b")
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(ResourceError, match="which is no folder"):
            require_writable(folder)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(ResourceError, match="read-only"):
        require_writable(tmp_path / "a")
