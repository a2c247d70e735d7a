"""How a command ends: its exit status, and what is said of it, by one of several processes."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable

from eqat_mm.errors import EqatError, explained_system_error
from eqat_mm.runtime.launcher import is_first
from eqat_mm.runtime.signals import INTERRUPTED, keep_status, quit_when_asked, stoppable

_UNTIL_ENDED = 30.0
"""Seconds in which a launcher ends all processes when one has ended with an error."""


def to_its_end(command: Callable[[], int]) -> int:
    """Run what this process is there for; return its exit status, which no signal changes any more."""
    quit_when_asked()
    status = command()
    keep_status(status)
    return status


def status_of(work: Callable[[], None]) -> int:
    """Do the work of a command; return the exit status: 0, 2 for a user's error, 128 + N when stopped by signal N."""
    try:
        work()
    except EqatError as error:
        return _refused(error)
    except SystemExit as left:
        if left.code:
            _ended_with_the_first()
        raise
    except BrokenPipeError:
        return _unread()
    except Exception as error:
        if (explained := explained_system_error(error)) is None:
            raise
        return _refused(explained)
    except KeyboardInterrupt as stop:
        return _interrupted(stop)
    return 0


def _refused(error: EqatError) -> int:
    """Say what is wrong; of several processes on a machine the first alone does, where they meet the same."""
    from eqat_mm.runtime.progress import complain

    if not _ended_with_the_first():
        which = "" if is_first() else f" in process {os.environ.get('RANK', os.environ['LOCAL_RANK'])}"
        complain(f"{error.kind}{which}\n{error}")
    return 2


def _ended_with_the_first() -> bool:
    """Whether the launcher ends this process, which waits for it, as it does when the first has ended with an error."""
    try:
        with stoppable():
            time.sleep(0 if is_first() else _UNTIL_ENDED)
    except KeyboardInterrupt:
        return True
    return False


def _unread() -> int:
    """Whoever reads what the command writes has seen enough."""
    from eqat_mm.runtime.progress import silence

    silence(sys.stdout)
    return 128 + signal.SIGPIPE


def _interrupted(stop: KeyboardInterrupt) -> int:
    from eqat_mm.runtime.progress import complain

    if is_first():
        complain(f"\r{INTERRUPTED}")  # at the beginning of a line, also where a bar was broken off as it was drawn
    return 128 + int(getattr(stop, "signal", signal.SIGINT))
