"""Being stopped: every way in which a process is asked to end is one exception.

A command ends with the status of the signal whenever that comes: `quit_when_asked` before it works on something,
`stoppable` while it does, and `keep_status` behind it, where the interpreter still takes its time to end. What must not
be left half done is `undisturbed`.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from types import FrameType
from typing import Any

from eqat_mm.runtime.launcher import is_first

INTERRUPTED = "interrupted; the same command continues from what was saved last"
"""What a command says that was asked to end."""

_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_SOON = 0.02  # seconds
_undisturbed = 0  # bodies of that name under way

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
            if is_first():
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


@contextmanager
def undisturbed() -> Iterator[None]:
    """Put off being stopped for as long as the body takes, which is next to nothing."""
    global _undisturbed
    _undisturbed += 1
    try:
        yield
    finally:
        _undisturbed -= 1


class _Stop(AbstractContextManager[None]):
    """Handler of the signals that ask to end, while it is entered."""

    def __init__(self) -> None:
        self._asked: int | None = None
        self._imports = _imports_in(sys._getframe())
        self._handlers = {number: signal.getsignal(number) for number in (*_ENDING, signal.SIGALRM)}
        self._unraisablehook = sys.unraisablehook

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Raise `Stopped`; behind what is undisturbed, and behind an import.

        Broken off that would pass for a package that cannot be had.
        """
        self._asked = number
        if _undisturbed or _imports_in(frame) > self._imports:
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
