"""A command in a process of its own, which does not outlive this one."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress

_PR_SET_PDEATHSIG = 1  # see prctl(2)
_PATIENCE = 10.0  # seconds


def run_child(words: Sequence[str], environment: dict[str, str]) -> int:
    """Run a command and return its exit status; when this process is stopped or dies, so is it, with all it started.

    Args:
        words: the command.
        environment: its environment variables.
    """
    with subprocess.Popen(words, env=environment, start_new_session=True, preexec_fn=_end_with_parent) as child:
        try:
            return child.wait()
        except BaseException:
            _end(child)
            raise


def _end(child: subprocess.Popen[bytes]) -> None:
    """Ask the processes of a session to end, and end them."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(child.pid, number)
        with suppress(subprocess.TimeoutExpired):
            child.wait(_PATIENCE)


def _end_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
