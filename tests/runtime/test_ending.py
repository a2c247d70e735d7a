"""An error is said once, whoever meets it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.commands.launching import DATA_PARALLEL, run, words_of

SCRIPT = """
import os, sys, time
from eqat_mm.errors import ConfigError
from eqat_mm.runtime import ending

ending._UNTIL_ENDED = float(sys.argv[2])
rank = os.environ["RANK"]

def work():
    if sys.argv[1] in ("all", rank):
        time.sleep(0.5 if rank == "0" else 0)  # the first is the last to find it
        raise ConfigError(f"on {rank}", "given", "allowed", "do")
    time.sleep(60)

sys.exit(ending.to_its_end(lambda: ending.status_of(work)))
"""


def under_torchrun(folder: Path, which: str, patience: float) -> str:
    (folder / "script.py").write_text(SCRIPT)
    done = run([*DATA_PARALLEL, str(folder / "script.py"), which, str(patience)])
    assert done.returncode == 1
    return done.stderr


def test_the_first_process_says_what_all_meet(tmp_path: Path) -> None:
    said = under_torchrun(tmp_path, "all", 60)
    assert said.count("allowed:") == 1
    assert "ConfigError\n  where:   on 0" in said
    assert "interrupted" not in said


def test_another_process_says_what_it_meets_alone(tmp_path: Path) -> None:
    said = under_torchrun(tmp_path, "1", 0.5)
    assert said.count("allowed:") == 1
    assert "ConfigError in process 1\n  where:   on 1" in said


@pytest.mark.slow
def test_a_refusal_under_a_launcher() -> None:
    done = run(words_of(DATA_PARALLEL, "e2e-qp", {"batch_siez": 3}))
    assert done.returncode == 1
    assert done.stderr.count("allowed:") == 1
    assert "--batch_siez" in done.stderr


INTERRUPTED_UNHEARD = """
import os
from eqat_mm.runtime.ending import status_of
from eqat_mm.runtime.signals import Stopped

def work():
    os.close(2)
    raise Stopped(15)

raise SystemExit(status_of(work))
"""


def test_an_interruption_that_nobody_reads_of_has_its_status() -> None:
    assert subprocess.run([sys.executable, "-c", INTERRUPTED_UNHEARD], check=False).returncode == 128 + 15
