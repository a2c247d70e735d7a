"""`eqat verify` says of every file whether it is as it was written."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from eqat_mm.checkpoint.manifest import MANIFEST, read_manifest
from eqat_mm.cli import main
from eqat_mm.commands.verbs.quantize import rtn
from eqat_mm.runtime.files import write_json
from tests.checkpoint.files import of_version_2
from tests.commands.jobs import rtn_job
from tests.tiny_model import Tiny


@pytest.fixture(scope="module")
def made(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return rtn(rtn_job(tiny, tmp_path_factory.mktemp("made")))


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """A checkpoint to be altered."""
    return Path(shutil.copytree(made, tmp_path / "model"))


def said(folder: Path, status: int, capsys: pytest.CaptureFixture[str]) -> tuple[list[str], str]:
    """What the command says of a folder, line by line, and its error."""
    capsys.readouterr()
    assert main(["verify", "--model", str(folder)]) == status
    captured = capsys.readouterr()
    return captured.out.splitlines(), captured.err


def test_a_whole_checkpoint(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines, _ = said(folder, 0, capsys)
    names = [MANIFEST, *read_manifest(folder).files]
    assert lines == [f"{name}: as written" for name in names] + [f"{folder}: whole, {len(names)} files"]
    assert said(folder.parent, 0, capsys)[0] == lines


def test_every_damaged_file_is_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shards = sorted(folder.glob("*.safetensors"))
    shards[0].write_bytes(shards[0].read_bytes()[:-1])
    (folder / "config.json").unlink()
    lines, error = said(folder, 2, capsys)
    assert f"{shards[0].name}: altered" in lines
    assert "config.json: missing" in lines
    assert sum(line.endswith("as written") for line in lines) == len(read_manifest(folder).files) - 1
    assert error.count("where:") == 1


def test_the_manifest_itself(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_json(folder / MANIFEST, of_version_2(folder))
    assert said(folder, 0, capsys)[0][0] == f"{MANIFEST}: of an older version, without its own hash"
    (folder / MANIFEST).write_text((folder / MANIFEST).read_text().replace("{", '{"sha256": "0",', 1))
    lines, error = said(folder, 2, capsys)
    assert lines == []
    assert f"where:   {folder / MANIFEST}" in error


def test_a_file_that_was_put_there_later(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    assert "chat_template.jinja" in said(folder, 2, capsys)[1]


def test_a_folder_that_is_no_checkpoint(tiny: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    assert f"no {MANIFEST} in it" in said(tiny.folder, 2, capsys)[1]
