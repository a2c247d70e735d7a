"""A process does not outlive the launcher that started it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.runtime.processes import alive, wait_for

LAUNCHER = "import subprocess, sys; print(subprocess.Popen([sys.executable, *sys.argv[1:]]).pid, flush=True); input()"
LAUNCHED = """
import ctypes, sys, time
from pathlib import Path
from eqat_mm.runtime.launcher import end_with_launcher
from eqat_mm.runtime.signals import stoppable
end_with_launcher()
Path(sys.argv[1]).write_text("started")
"""
SLEEP = "time.sleep(60)"
WAIT_WITHOUT_HANDLERS = """
mutex = ctypes.create_string_buffer(64)
with stoppable():
    for _ in range(2):
        ctypes.CDLL(None).pthread_mutex_lock(mutex)
"""


@pytest.mark.parametrize("waits", [SLEEP, WAIT_WITHOUT_HANDLERS], ids=["in python", "in a library"])
def test_a_process_ends_with_its_launcher(tmp_path: Path, waits: str) -> None:
    noted = tmp_path / "started"
    words = [sys.executable, "-c", LAUNCHER, "-c", LAUNCHED + waits, str(noted)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as started:
        assert started.stdout is not None
        process = int(started.stdout.readline())
        assert wait_for(noted.is_file)
        assert alive(process)
        started.kill()
    assert wait_for(lambda: not alive(process))
