"""A command in a process of its own, which does not outlive this one."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

_PATIENCE = 10  # seconds
_WARDEN = f'read _; kill -s TERM -- "-$1"; sleep {_PATIENCE}; kill -s KILL -- "-$1"'
"""Shell words: wait for the other end of a pipe to be gone, then end the processes of a group."""


def run_child(words: Sequence[str], environment: dict[str, str]) -> int:
    """Run a command and return its exit status; when this process is stopped or dies, so is it, with all it started.

    Args:
        words: the command.
        environment: its environment variables.
    """
    with subprocess.Popen(words, env=environment, start_new_session=True) as child:
        try:
            with _warden_of(child.pid):
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


@contextmanager
def _warden_of(group: int) -> Iterator[None]:
    """Have a group of processes ended if this process dies in the body, which leaves it no time to do so itself."""
    words, quiet = ["sh", "-c", _WARDEN, "sh", str(group)], subprocess.DEVNULL
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=quiet, stderr=quiet, start_new_session=True) as warden:
        try:
            yield
        finally:
            warden.kill()
