"""Being stopped: every way in which a process is asked to end is one exception, and no process is left behind.

A command ends with the status of the signal whenever that comes: `quit_when_asked` before it works on something,
`stoppable` while it does, and `keep_status` behind it, where the interpreter still takes its time to end.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from types import FrameType
from typing import Any

INTERRUPTED = "interrupted; the same command continues from what was saved last"
"""What a command says that was asked to end."""

_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_SOON = 0.02  # seconds
_LOOK_EVERY = 1.0  # seconds
_PATIENCE = 5.0  # seconds

_Handler = Callable[[int, FrameType | None], Any] | int | None


class Stopped(KeyboardInterrupt):
    """A signal that asks to end, as Ctrl-C does.

    Attributes:
        signal: its number.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.signal = number


def quit_when_asked() -> None:
    """Let a signal end this process, which is the command's own, at once: it has begun nothing."""

    def end(number: int, frame: FrameType | None) -> None:
        with suppress(OSError, ValueError, AttributeError):  # it may be closed, or there may be none
            os.write(sys.__stderr__.fileno(), f"{INTERRUPTED}\n".encode())  # type: ignore[union-attr]
        os._exit(128 + number)

    _handle(end)
    atexit.register(_handle, signal.SIG_IGN)  # the first to come is the last to be called


def keep_status(status: int) -> None:
    """Let a signal end this process, which is done, with the status that it has anyway."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    _handle(lambda *_: os._exit(status))


def stoppable() -> AbstractContextManager[None]:
    """Let SIGINT, SIGTERM and SIGHUP raise `Stopped` in the body, the first time; it then tidies up.

    Raises:
        Stopped: by the end of the body at the latest, whatever became of the exception in it.
    """
    return _Stop() if threading.current_thread() is threading.main_thread() else nullcontext()


class _Stop(AbstractContextManager[None]):
    """Handler of the signals that ask to end, while it is entered."""

    def __init__(self) -> None:
        self._asked: int | None = None
        self._imports = _imports_in(sys._getframe())
        self._handlers = {number: signal.getsignal(number) for number in (*_ENDING, signal.SIGALRM)}
        self._unraisablehook = sys.unraisablehook

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Raise `Stopped`, but not within an import: broken off it would pass for a package that cannot be had."""
        self._asked = number
        if _imports_in(frame) > self._imports:
            self._again_soon(number)
            return
        _handle(signal.SIG_DFL)  # the second time it ends at once
        raise Stopped(number)

    def __enter__(self) -> None:
        sys.unraisablehook = self._unraisable
        _handle(self)

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if self._asked is not None:
            signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in self._handlers.items():
            if handler is not None:  # None is one that is not Python's
                signal.signal(number, handler)
        sys.unraisablehook = self._unraisablehook
        if self._asked is not None and not isinstance(error, Stopped):
            raise Stopped(self._asked) from error

    def _unraisable(self, lost: Any) -> None:
        """Ask again where the exception was lost in a function that a library calls back."""
        if isinstance(lost.exc_value, Stopped):
            self._again_soon(lost.exc_value.signal)
        else:
            self._unraisablehook(lost)

    def _again_soon(self, number: int) -> None:
        signal.signal(signal.SIGALRM, lambda _, frame: self(number, frame))
        signal.setitimer(signal.ITIMER_REAL, _SOON)


def _handle(handler: _Handler) -> None:
    """Handle all that ask to end alike, but those that whoever started this process wants ignored, as nohup does."""
    for number in _ENDING:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, handler)


def _imports_in(frame: FrameType | None) -> int:
    """Return how many imports are under way."""
    count = 0
    while frame is not None:
        count += frame.f_code.co_filename == "<frozen importlib._bootstrap>"
        frame = frame.f_back
    return count


def end_with_launcher() -> None:
    """End this process, as SIGTERM does, when the launcher that started it is gone, whose other processes are left."""
    watched = _launchers()
    if watched:
        threading.Thread(target=_watch, args=(watched,), daemon=True).start()


def _watch(watched: list[int]) -> None:
    while _ancestors(len(watched)) == watched:
        time.sleep(_LOOK_EVERY)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_PATIENCE)
    os.kill(os.getpid(), signal.SIGKILL)  # it waits for the others where no handler runs, as in a collective


def _launchers() -> list[int]:
    """Return the processes above this one that started it as one of several: DeepSpeed's launcher is two."""
    parents = _ancestors(2)
    return parents if len(parents) == 2 and "deepspeed" in _command(parents[1]) else parents[:1]


def _ancestors(count: int) -> list[int]:
    found = [os.getppid()]
    while len(found) < count and (above := _parent(found[-1])) is not None:
        found.append(above)
    return found


def _parent(process: int) -> int | None:
    try:
        return int(Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[1])
    except (OSError, ValueError, IndexError):
        return None


def _command(process: int) -> str:
    try:
        return Path(f"/proc/{process}/cmdline").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
