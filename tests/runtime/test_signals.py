"""Whoever is asked to end ends like Ctrl-C, and leaves no process behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from eqat_mm.runtime.children import run_child
from eqat_mm.runtime.signals import Stopped, stoppable

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
LAUNCHER = "import subprocess, sys; print(subprocess.Popen([sys.executable, *sys.argv[1:]]).pid, flush=True); input()"
LAUNCHED = """
import ctypes, sys, time
from pathlib import Path
from eqat_mm.runtime.signals import end_with_launcher, stoppable
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


def wait_for(happened: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 30
    while not happened() and time.monotonic() < deadline:
        time.sleep(0.02)
    return happened()


def alive(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_is_an_exception_the_first_time(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with pytest.raises(Stopped) as raised, stoppable():
        signal.raise_signal(number)
    assert raised.value.signal == number
    assert isinstance(raised.value, KeyboardInterrupt)
    assert signal.getsignal(number) is before


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
