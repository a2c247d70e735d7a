"""Whoever is asked to end ends like Ctrl-C, at whatever moment."""

from __future__ import annotations

import fcntl
import importlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO

import pytest

from eqat_mm.runtime.lock import locked
from eqat_mm.runtime.signals import INTERRUPTED, Stopped, stoppable, undisturbed

ASKED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@pytest.mark.parametrize("number", ASKED)
def test_a_signal_is_an_exception_the_first_time(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with pytest.raises(Stopped) as raised, stoppable():
        signal.raise_signal(number)
    assert raised.value.signal == number
    assert isinstance(raised.value, KeyboardInterrupt)
    assert signal.getsignal(number) is before


def stopped_in(work: Callable[[], None]) -> Stopped:
    with pytest.raises(Stopped) as raised, stoppable():
        work()
    return raised.value


def test_a_second_signal_ends_at_once() -> None:
    stop = stoppable()
    stop.__enter__()
    with pytest.raises(Stopped):
        signal.raise_signal(signal.SIGINT)
    handlers = {signal.getsignal(number) for number in ASKED}
    stop.__exit__(Stopped, Stopped(signal.SIGINT), None)
    assert handlers == {signal.SIG_DFL}


def test_what_is_ignored_stays_ignored() -> None:
    """As `nohup` wants it."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stoppable():
            signal.raise_signal(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", ASKED)
def test_an_import_is_not_broken_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals) -> None:
    """The optional package would be taken for one that cannot be had."""
    words = f"import signal\ntry:\n    signal.raise_signal({number.value})\nexcept BaseException as e:\n"
    (tmp_path / "optional_package.py").write_text(words + "    raise ImportError from e\nwhole = True\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "optional_package", raising=False)

    def work() -> None:
        assert importlib.import_module("optional_package").whole
        time.sleep(30)

    assert stopped_in(work).signal == number


@pytest.mark.parametrize("number", ASKED)
def test_what_is_undisturbed_is_done_first(number: signal.Signals) -> None:
    done = []

    def work() -> None:
        with undisturbed(), undisturbed():
            signal.raise_signal(number)
            time.sleep(0.05)
            done.append("body")
        time.sleep(30)

    assert stopped_in(work).signal == number
    assert done == ["body"]


@pytest.mark.parametrize("call", [1, 2])
def test_a_lock_that_is_being_taken_or_given_back_does_not_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    """The signal comes when its file is there already, or is there still."""
    flock, calls = fcntl.flock, []

    def disturbed(file: IO[str], kind: int) -> None:
        calls.append(kind)
        if len(calls) == call:
            signal.raise_signal(signal.SIGHUP)
        flock(file, kind)

    def work() -> None:
        with locked(tmp_path / "new" / "run"):
            pass
        time.sleep(30)

    monkeypatch.setattr(fcntl, "flock", disturbed)
    assert stopped_in(work).signal == signal.SIGHUP
    assert len(calls) == 2
    assert not list(tmp_path.iterdir())


class Forgotten:
    """Is asked to end while it is collected, where exceptions are lost."""

    def __del__(self) -> None:
        signal.raise_signal(signal.SIGTERM)


def test_a_signal_that_a_library_swallows_comes_again() -> None:
    def work() -> None:
        Forgotten()
        time.sleep(30)

    began = time.monotonic()
    assert stopped_in(work).signal == signal.SIGTERM
    assert time.monotonic() - began < 10


def test_a_signal_that_becomes_another_error_is_one_still() -> None:
    def work() -> None:
        try:
            signal.raise_signal(signal.SIGTERM)
        except BaseException as stopped:
            raise ImportError("initialization failed") from stopped

    assert isinstance(stopped_in(work).__cause__, ImportError)


def test_a_signal_that_is_caught_is_raised_in_the_end() -> None:
    with pytest.raises(Stopped), stoppable(), suppress(BaseException):
        signal.raise_signal(signal.SIGHUP)
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


PROCESS = """
import atexit, os, sys, threading, time
from eqat_mm.runtime.signals import keep_status, quit_when_asked

def asked(kill=os.kill, number=int(sys.argv[2]), process=os.getpid(), sleep=time.sleep):
    kill(process, number)
    sleep(0.05)

class Last:
    def __del__(self, asked=asked):
        asked()

quit_when_asked()
{work}
keep_status(3)
{rest}
sys.exit(3)
"""
PHASES = {
    "before": ("asked()", ""),
    "behind": ("", "asked()"),
    "while threads end": ("", "threading.Thread(target=asked).start()"),
    "in a function at exit": ("atexit.register(asked)", ""),
    "in the last object": ("sys.modules['kept'] = Last()", ""),
}


@pytest.mark.parametrize("number", ASKED)
@pytest.mark.parametrize("phase", PHASES)
def test_the_status_is_that_of_the_signal_or_of_the_work(phase: str, number: signal.Signals) -> None:
    work, rest = PHASES[phase]
    words = [sys.executable, "-c", PROCESS.format(work=work, rest=rest), phase, str(number.value)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == (128 + number if phase == "before" else 3)
    assert done.stderr == (f"{INTERRUPTED}\n" if phase == "before" else "")
