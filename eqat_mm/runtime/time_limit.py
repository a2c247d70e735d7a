"""A time limit for programs that come with a model, in whatever thread they run."""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

LOOKS = 0.1
"""Seconds between two looks at what is still running."""


class _Watcher:
    """One thread that raises an error in those whose time is up; the watched ones pay two entries in a dictionary."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._ends: dict[int, float] = {}
        self._thread: threading.Thread | None = None

    def watch(self, thread: int, end: float) -> None:
        """Watch a thread until a moment."""
        with self._lock:
            self._ends[thread] = end
            if self._thread is None or not self._thread.is_alive():  # none yet, or another process's
                self._thread = threading.Thread(target=self._look, name="time limit", daemon=True)
                self._thread.start()

    def leave(self, thread: int) -> bool:
        """Watch a thread no more; return whether its time was up, and the error may still be on its way."""
        with self._lock:
            return self._ends.pop(thread, None) is None

    def _look(self) -> None:
        while True:
            time.sleep(LOOKS)
            now = time.monotonic()
            with self._lock:
                for thread in [thread for thread, end in self._ends.items() if now > end]:
                    del self._ends[thread]
                    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(TimeoutError))


_WATCHER = _Watcher()


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise an error in the body when its time is up.

    It is raised between two steps of the interpreter: a single call into C is waited for.

    Args:
        seconds: that the body may take.

    Raises:
        TimeoutError: the body took longer.
    """
    me = threading.get_ident()
    _WATCHER.watch(me, time.monotonic() + seconds)
    late = False
    try:
        yield
    except TimeoutError:
        late = True
        raise
    finally:
        if _WATCHER.leave(me) and not late:
            time.sleep(60 * LOOKS)  # the error comes here
