"""What the system refuses is said in four lines; who stops reading ends nothing but the reading."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from eqat_mm.cli import main
from eqat_mm.errors import explained_system_error
from tests.checkpoint.files import assert_four_lines
from tests.tiny_model import Tiny


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.ENOTDIR, errno.EFBIG, errno.EDQUOT])
def test_an_error_of_the_system_has_four_lines(number: int) -> None:
    error = explained_system_error(OSError(number, os.strerror(number), "/data/model"))
    assert error is not None
    assert_four_lines(error)
    assert (error.where, error.given) == ("/data/model", os.strerror(number))


def test_an_error_that_only_code_can_cause_is_none_of_the_users() -> None:
    assert explained_system_error(OSError(errno.EBADF, "bad file descriptor")) is None
    assert explained_system_error(OSError("made up")) is None


@pytest.mark.parametrize("below", ["file", "file/run", "file/run/deeper"])
def test_an_output_that_cannot_be_made(
    tiny: Tiny, tmp_path: Path, below: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("mine")
    arguments = ["--model", str(tiny.folder), "--quant.group_size", "32", "--output", str(tmp_path / below)]
    assert main(["rtn", *arguments]) == 2
    *_, name, where, given, allowed, do = capsys.readouterr().err.splitlines()
    assert name.endswith("ResourceError")
    assert [line.split(":")[0].strip() for line in (where, given, allowed, do)] == ["where", "given", "allowed", "do"]
    assert (tmp_path / "file").read_text() == "mine"


def test_output_that_nobody_reads_does_not_end_the_work(tiny: Tiny, tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    words = ["rtn", "--model", str(tiny.folder), "--quant.group_size", "32", "--output", str(tmp_path / "run")]
    done = subprocess.run([sys.executable, "-m", "eqat_mm.cli", *words], stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert done.returncode == 0
    assert b"Traceback" not in done.stderr
    assert b"Broken" not in done.stderr
    assert (tmp_path / "run" / "model" / "eqat.json").is_file()


def test_a_terminal_without_the_characters(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "eqat_mm.cli", "rtn", "--model", "日本"]
    done = subprocess.run(words, env=os.environ | {"PYTHONIOENCODING": "cp1252"}, capture_output=True)
    assert done.returncode == 2
    assert b"Traceback" not in done.stderr
    assert b"'??'" in done.stderr
