"""What does not end by itself is ended, in any thread."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable

import pytest

from eqat_mm.runtime.time_limit import time_limit

LIMIT = 0.2


def loops() -> None:
    while True:
        pass


def calls() -> None:
    def nothing() -> None:
        pass

    while True:
        nothing()


def ended(work: Callable[[], None], file: str) -> bool:
    began = time.monotonic()
    with pytest.raises(TimeoutError, match="its end"), time_limit(LIMIT, file):
        work()
    return time.monotonic() - began < 10


@pytest.mark.parametrize(("work", "file"), [(loops, __file__), (calls, "another file")])
def test_a_loop_without_an_end(work: Callable[[], None], file: str) -> None:
    assert ended(work, file)


def test_a_loop_in_another_thread() -> None:
    found: list[bool] = []
    thread = threading.Thread(target=lambda: found.append(ended(loops, __file__)))
    thread.start()
    thread.join(20)
    assert found == [True]


def test_what_ends_in_time_gives_its_result_and_is_watched_no_more() -> None:
    before = sys.gettrace()
    with time_limit(LIMIT, __file__):
        found = [number**2 for number in range(3)]
    time.sleep(LIMIT)
    assert found == [0, 1, 4]
    assert sys.gettrace() is before


def test_an_error_of_the_body_is_left_as_it_is() -> None:
    before = sys.gettrace()
    with pytest.raises(ZeroDivisionError), time_limit(LIMIT, __file__):
        _ = 1 / 0
    assert sys.gettrace() is before
