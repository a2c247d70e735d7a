"""A time limit for programs that come with a model, in whatever thread or process they run."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


@contextmanager
def time_limit(seconds: float, file: str) -> Iterator[None]:
    """Raise an error in the body when its time is up.

    It is raised by Python code alone: where a function is called, or at a line of `file`.

    Args:
        seconds: that the body may take.
        file: in which loops may be; the more code is watched, the slower it is.

    Raises:
        TimeoutError: the body took longer.
    """
    end = time.monotonic() + seconds

    def watch(frame: FrameType, event: str, argument: Any) -> Any:
        if time.monotonic() > end:
            raise TimeoutError("it does not come to its end")
        return watch if frame.f_code.co_filename == file else None

    before = sys.gettrace()
    sys.settrace(watch)
    try:
        yield
    finally:
        sys.settrace(before)
