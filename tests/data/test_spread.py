"""Work on all cores: in order, with its errors, and told when a process is gone."""

from __future__ import annotations

import multiprocessing
import os

import pytest

from eqat_mm.data.image_text import spread as module
from eqat_mm.data.image_text.spread import spread
from eqat_mm.errors import ResourceError


@pytest.fixture(autouse=True)
def _two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1})


@pytest.mark.parametrize("count", [0, 3, 40])
def test_results_come_in_order(count: int) -> None:
    assert [*spread(lambda number: number**2, range(count), "square")] == [number**2 for number in range(count)]
    assert not multiprocessing.active_children()


def test_an_error_of_the_work_is_raised_here() -> None:
    with pytest.raises(ZeroDivisionError):
        list(spread(lambda number: 1 // (number - 30), range(40), "divide"))
    assert not multiprocessing.active_children()


def test_a_process_that_is_ended_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FEW", 1)
    with pytest.raises(ResourceError, match="ended from outside"):
        list(spread(lambda number: os._exit(9) if number == 5 else number, range(9), "check samples"))
