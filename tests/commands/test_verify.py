"""`eqat verify` prints a line for every check, and ends with 2 where one failed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from eqat_mm.checkpoint.manifest import MANIFEST, read_manifest
from eqat_mm.cli import main
from eqat_mm.commands.verbs.quantize import rtn
from eqat_mm.commands.verbs.tune import e2e_qp
from tests.commands.jobs import e2e_qp_job, rtn_job
from tests.tiny_model import Tiny


@pytest.fixture(scope="module")
def made(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return rtn(rtn_job(tiny, tmp_path_factory.mktemp("made") / "rtn"))


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """A checkpoint to be altered."""
    return Path(shutil.copytree(made, tmp_path / "model"))


def said(folder: Path, status: int, capsys: pytest.CaptureFixture[str], *options: str) -> tuple[list[str], str]:
    """What the command says of a folder, line by line, and its error."""
    capsys.readouterr()
    assert main(["verify", str(folder), *options]) == status
    captured = capsys.readouterr()
    return captured.out.splitlines(), captured.err


def test_a_whole_checkpoint(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines, _ = said(folder, 0, capsys)
    assert [line.split(":")[0] for line in lines[:-1]] == [
        *(f"ok   {name}" for name in ("manifest", "files", "others", "index", "config")),
        *(f"ok   {name}" for name in ("shapes", "codes", "zero points", "step sizes")),
        "-    integers",
        "ok   untouched",
        "ok   logits",
    ]
    assert lines[-1] == f"{folder}: 11 checks passed"
    assert said(folder.parent, 0, capsys)[0] == lines


def test_the_stage_before_is_found(tiny: Tiny, made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tuned = e2e_qp(e2e_qp_job(tiny, made, made.parent.parent / "e2e-qp"))
    lines, _ = said(tuned, 0, capsys, "--logits", "false")
    assert f"ok   integers: all codes and zero points as in {made}" in lines
    assert "-    logits: not looked at: left out" in lines


def test_every_damaged_file_is_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shards = sorted(folder.glob("*.safetensors"))
    shards[0].write_bytes(shards[0].read_bytes()[:-1])
    (folder / "config.json").unlink()
    lines, error = said(folder, 2, capsys)
    assert f"FAIL file: {shards[0].name}: altered: not the SHA-256 it had" in lines
    assert "FAIL file: config.json: missing" in lines
    assert error.count("where:") == 1


def test_for_scripts(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (line,), _ = said(folder, 0, capsys, "--json", "--logits", "false")
    found = json.loads(line)
    assert found["passed"]
    assert {check["name"]: check["passed"] for check in found["checks"]}["logits"] is None
    (folder / "config.json").write_text("{}")
    (line,), error = said(folder, 2, capsys, "--json")
    found = json.loads(line)
    assert not found["passed"]
    assert "config.json" in next(check["said"] for check in found["checks"] if check["passed"] is False)
    assert "where:" in error


def test_the_text_is_looked_for_first(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines, error = said(folder, 2, capsys, "--text", "nowhere.txt")
    assert lines == []
    assert "no file nowhere.txt" in error


def test_an_altered_manifest(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = (folder / MANIFEST).read_text()
    (folder / MANIFEST).write_text(text.replace(read_manifest(folder).stage, "block-ap", 1))
    lines, error = said(folder, 2, capsys)
    assert lines == []
    assert f"where:   {folder / MANIFEST}" in error


def test_a_folder_that_is_no_checkpoint(tiny: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    assert f"no {MANIFEST} in it" in said(tiny.folder, 2, capsys)[1]
