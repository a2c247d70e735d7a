"""What a reader may do with any input: read it, or refuse it with an error of ours, soon."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from eqat_mm.data.image_text.problems import BadSample
from eqat_mm.errors import EqatError


class _HangsError(BaseException):
    """Not an Exception, which a reader would take for bad data."""


@contextmanager
def only_our_errors(seconds: int = 60) -> Iterator[None]:
    """Let the body end with an error of ours that can be printed; anything else, or no end, fails the test."""

    def late(*_: Any) -> None:
        raise _HangsError(f"no answer within {seconds} seconds")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    except (EqatError, BadSample) as error:
        str(error).encode()
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
