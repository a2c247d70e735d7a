"""Asked to end: one line, the status that shells expect, no process left, and the same command goes on."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from eqat_mm.runtime.signals import INTERRUPTED
from tests.commands.launching import DATA_PARALLEL, DEEPSPEED, environment, words_of
from tests.faults.cases import BLOCK_AP, E2E_QP, GENERATE_DATA, LLM_QAT, RTN, Case
from tests.faults.conftest import Bench, Tally
from tests.faults.warm import ROOT, Fault
from tests.tiny_model import Tiny

ASKED = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
LINE = INTERRUPTED
FAST = 30.0  # seconds in which ranks that nobody needs are gone, even on a busy machine


def stopped(bench: Bench, case: Case, number: int, part: float) -> tuple[bool, list[str]]:
    """Stop a command in a part of its time; return whether it was still at work, and what went wrong."""
    folder = bench.new()
    ended = bench.run(case, folder, Fault(after=part * bench.whole(case)[1].seconds, signal=number))
    if ended.status == 0:
        return False, []  # it was finished
    wrong = [f"status {ended.status}"] if ended.status != 128 + number else []
    wrong += [] if ended.err.splitlines()[-1:] == [LINE] and "Traceback" not in ended.err else [ended.err]
    wrong += ["a lock"] if list(folder.rglob("run.lock")) else []
    return True, [
        f"{case.name}, signal {number} at {part:.2f}: {each}" for each in wrong + bench.differences(case, folder)
    ]


def test_asked_to_end(bench: Bench, tally: Tally) -> None:
    tried, failures = 0, []
    for number in ASKED:
        for part in (0.6, 0.4, 0.2, 0.1):  # the first time may have been slower
            was_at_work, wrong = stopped(bench, RTN, number, part)
            failures += wrong[:1]
            if was_at_work:
                break
        tried += was_at_work
    tally("SIGTERM, SIGHUP, SIGINT", tried, failures)


@pytest.mark.faults
@pytest.mark.parametrize("number", ASKED, ids=lambda number: number.name)
@pytest.mark.parametrize("case", [RTN, *BLOCK_AP.values(), E2E_QP, LLM_QAT, GENERATE_DATA], ids=lambda case: case.name)
def test_asked_to_end_at_random_moments(bench: Bench, tally: Tally, case: Case, number: signal.Signals) -> None:
    draw, tried, failures = random.Random(f"{case.name} {number}"), 0, []
    while tried < 2:
        was_at_work, wrong = stopped(bench, case, number, draw.uniform(0.1, 0.9))
        tried += was_at_work
        failures += wrong[:1]
    tally("SIGTERM, SIGHUP, SIGINT", tried, failures)


@pytest.mark.faults
@pytest.mark.parametrize("number", ASKED, ids=lambda number: number.name)
def test_asked_to_end_while_it_starts(bench: Bench, tally: Tally, number: signal.Signals) -> None:
    command = [sys.executable, "-m", "eqat_mm.cli", *RTN.words(bench.place, bench.new() / "run")]
    failures = []
    for after in (0.3, 1.0, 2.0):
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=environment()) as process:
            time.sleep(after)
            process.send_signal(number)
            error = process.communicate()[1]
        done = process.returncode == 0 and after > 1
        if not (done or process.returncode == 128 + number) or "Traceback" in error:
            failures.append(f"after {after} s: status {process.returncode}, {error}")
    tally("SIGTERM, SIGHUP, SIGINT while it imports", 3, failures)


# ---- several processes ------------------------------------------------------------------------------


def processes_of(mark: str) -> list[psutil.Process]:
    """Every process whose command line names a folder."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if any(mark in word for word in process.cmdline()) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def left_after(mark: str, patience: float = FAST) -> list[str]:
    """The processes of a folder that are still there when time is up; they are ended then."""
    end = time.monotonic() + patience
    while processes_of(mark) and time.monotonic() < end:
        time.sleep(0.2)
    left = processes_of(mark)
    said = []
    for process in left:
        with suppress(psutil.Error):
            said.append(f"{process.pid} {process.status()} {' '.join(process.cmdline())[:300]}")
        with suppress(psutil.Error):
            process.kill()
    return said


def launched(launcher: list[str], tiny: Tiny, base: Path, output: Path) -> list[str]:
    settings: dict[str, Any] = {
        "model": tiny.folder,
        "quantized": base,
        "output": output,
        "loss": "cross-entropy",
        "data.source": tiny.text,
        "data.length": 16,
        "data.count": 48,
        "batch_size": 2,
        "accumulation": 1,
        "max_steps": 2000,
        "save_steps": 5,
        "precision": "float32",
        "device": "cpu",
    }
    return words_of(launcher, "e2e-qp", settings)


@contextmanager
def at_work(words: list[str], output: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A launcher whose processes have written their first checkpoint."""
    quiet = subprocess.DEVNULL
    with subprocess.Popen(words, stdout=quiet, stderr=quiet, env=environment(), cwd=ROOT) as launcher:
        while not list((output / "trainer").glob("checkpoint-*/trainer_state.json")):
            assert launcher.poll() is None, "the run ended before its first checkpoint"
            time.sleep(0.1)
        yield launcher
        with suppress(subprocess.TimeoutExpired):
            launcher.wait(60)
        launcher.kill()


@pytest.mark.faults
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda number: number.name)
@pytest.mark.parametrize("launcher", [DATA_PARALLEL, DEEPSPEED], ids=["torchrun", "deepspeed"])
def test_a_launcher_takes_its_processes_with_it(
    bench: Bench, tally: Tally, launcher: list[str], number: signal.Signals
) -> None:
    output = bench.new() / "run"
    with at_work(launched(launcher, bench.place.tiny, bench.place.base, output), output) as process:
        assert len(processes_of(str(output))) >= 3
        process.send_signal(number)
        left = left_after(str(output))
    assert not (output / "model").exists()
    tally("INT, TERM, KILL to a launcher of two processes", 1, left[:1])


PARENT = """
import sys
from eqat_mm.runtime.children import run_child
from eqat_mm.runtime.signals import Stopped, stoppable
try:
    with stoppable():
        sys.exit(run_child([sys.executable, "-c", sys.argv[1], sys.argv[2]], {}))
except KeyboardInterrupt as stop:
    sys.exit(128 + getattr(stop, "signal", 2))
"""
CHILD = """
import pathlib, subprocess, sys, time
if len(sys.argv) > 2:
    pathlib.Path(sys.argv[1], "ready").touch()
    time.sleep(300)
subprocess.run([sys.executable, "-c", pathlib.Path(sys.argv[1], "child.py").read_text(), sys.argv[1], "grandchild"])
"""


@pytest.mark.parametrize("number", [*ASKED, signal.SIGKILL], ids=lambda number: number.name)
def test_a_child_ends_with_its_parent(tmp_path: Path, tally: Tally, number: signal.Signals) -> None:
    (tmp_path / "child.py").write_text(CHILD)
    words = [sys.executable, "-c", PARENT, CHILD, str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(words, env=environment, stderr=subprocess.DEVNULL) as parent:
        while not (tmp_path / "ready").exists():
            assert parent.poll() is None
            time.sleep(0.02)
        parent.send_signal(number)
        left = left_after(str(tmp_path))
    assert parent.returncode == (-number if number == signal.SIGKILL else 128 + number)
    tally("INT, TERM, HUP, KILL to the parent of a command", 1, left[:1])
