"""What does not end by itself is ended, in any thread."""

from __future__ import annotations

import multiprocessing
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


def ended(work: Callable[[], None]) -> bool:
    began = time.monotonic()
    with pytest.raises(TimeoutError), time_limit(LIMIT):
        work()
    return time.monotonic() - began < 10


@pytest.mark.parametrize("work", [loops, calls])
def test_a_loop_without_an_end(work: Callable[[], None]) -> None:
    assert ended(work)


def test_a_loop_in_another_thread() -> None:
    found: list[bool] = []
    thread = threading.Thread(target=lambda: found.append(ended(loops)))
    thread.start()
    thread.join(20)
    assert found == [True]


def test_what_ends_in_time_gives_its_result_and_is_watched_no_more() -> None:
    with time_limit(LIMIT):
        found = [number**2 for number in range(3)]
    time.sleep(LIMIT + 0.3)
    assert found == [0, 1, 4]


def test_an_error_of_the_body_is_left_as_it_is() -> None:
    with pytest.raises(ZeroDivisionError), time_limit(LIMIT):
        _ = 1 / 0


def test_what_ends_at_the_very_moment_is_late() -> None:
    """The error is on its way when the body ends; it must not come out anywhere else."""
    for _ in range(5):
        try:
            with time_limit(0.0):
                time.sleep(0.1)
        except TimeoutError:
            continue
    time.sleep(0.3)


def test_a_forked_process_has_a_watcher_of_its_own() -> None:
    with time_limit(LIMIT):
        pass
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.apply_async(ended, (loops,)).get(timeout=20)
