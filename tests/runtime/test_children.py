"""A command that another one runs does not outlive it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from eqat_mm.runtime.children import run_child
from tests.runtime.processes import alive, wait_for

PARENT = """
import sys
from eqat_mm.runtime.children import run_child
from eqat_mm.runtime.signals import stoppable
import os
with stoppable():
    run_child([sys.executable, "-c", sys.argv[1], *sys.argv[2:]], dict(os.environ))
"""
CHILD = """
import os, subprocess, sys, time
from pathlib import Path
below = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
Path(sys.argv[1]).write_text(f"{os.getpid()} {below.pid}")
time.sleep(60)
"""


def test_a_child_gives_its_status() -> None:
    assert run_child([sys.executable, "-c", "raise SystemExit(3)"], dict(os.environ)) == 3


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_child_does_not_outlive_its_parent(tmp_path: Path, number: signal.Signals) -> None:
    noted = tmp_path / "processes"
    words = [sys.executable, "-c", PARENT, CHILD, str(noted)]
    with subprocess.Popen(words, stderr=subprocess.DEVNULL) as parent:
        assert wait_for(lambda: noted.is_file() and len(noted.read_text().split()) == 2)
        child, below = map(int, noted.read_text().split())
        parent.send_signal(number)
        assert parent.wait(30) != 0
    assert wait_for(lambda: not alive(child))
    assert wait_for(lambda: not alive(below))
