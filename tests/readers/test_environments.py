"""An environment is made once for its versions, and says what failed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from eqat_mm.errors import DataError
from tests.readers import environments
from tests.readers.environments import Environment


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EQAT_READERS", str(tmp_path))


def npm(folder: Path, monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    """Put a program of this name first on the path."""
    folder.mkdir()
    (folder / "npm").write_text("\n".join(["#!/bin/sh", *lines, ""]))
    (folder / "npm").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


def test_made_once_for_its_versions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    npm(tmp_path / "bin", monkeypatch, f"echo $3 >> {tmp_path}/asked", 'cd "$5" && touch it && tar czf it.tgz it')
    for version in (1, 1, 2):
        monkeypatch.setitem(environments.ENVIRONMENTS, "tools", Environment(npm=f"tools@{version}"))
        assert (environments.made("tools") / "it").is_file()
    assert (tmp_path / "asked").read_text().split() == ["tools@1", "tools@2"]


def test_what_failed_is_said_and_the_others_are_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    npm(
        tmp_path / "bin",
        monkeypatch,
        'case $3 in bad*) echo "no such package" >&2; exit 3;; esac',
        "touch $5/it",
        'cd "$5"',
        "tar czf it.tgz it",
    )
    monkeypatch.setitem(environments.ENVIRONMENTS, "bad", Environment(npm="bad@1"))
    monkeypatch.setitem(environments.ENVIRONMENTS, "good", Environment(npm="good@1"))
    assert environments.main(["bad", "good"]) == 1
    said = capsys.readouterr()
    assert "no such package" in said.err
    assert "status 3" in said.err
    assert said.out.startswith(f"good: {tmp_path / 'good'}, 0 MB")


def test_a_missing_program_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setitem(environments.ENVIRONMENTS, "tools", Environment(npm="tools@1"))
    with pytest.raises(DataError, match="npm"):
        environments.made("tools")


def test_what_does_not_import_is_not_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    npm(tmp_path / "bin", monkeypatch, 'cd "$5" && touch it && tar czf it.tgz it')
    monkeypatch.setitem(environments.ENVIRONMENTS, "tools", Environment(npm="tools@1", proof="no_such_module"))
    for _ in range(2):
        with pytest.raises(DataError, match="no_such_module"):
            environments.made("tools")
