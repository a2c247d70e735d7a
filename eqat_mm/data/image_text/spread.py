"""Work that is spread over all cores of this machine, by processes that do not outlive this one."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

from eqat_mm.errors import ResourceError
from eqat_mm.runtime.launcher import end_with_launcher
from eqat_mm.runtime.progress import progress

_MOST_PROCESSES = 32
FEW = 8
"""Stretches that one process does before others have started."""

_work: Callable[[Any], Any]


def spread(work: Callable[[Any], Any], stretches: Sequence[Any], what: str) -> Iterator[Any]:
    """Yield what `work` returns for each stretch, in their order, by all cores; a few are done here.

    Raises:
        ResourceError: a process was ended from outside, as a system does that runs out of memory.
    """
    cores = min(len(os.sched_getaffinity(0)), _MOST_PROCESSES, len(stretches))
    if len(stretches) <= FEW or cores == 1:
        yield from map(work, progress(stretches, what=what, unit="batch"))
        return
    # Forked, so that what the work needs is there without being sent or loaded again.
    pool = ProcessPoolExecutor(cores, get_context("fork"), initializer=_begin, initargs=(work,))
    try:
        yield from progress(pool.map(_do, stretches), what=what, total=len(stretches), unit="batch")
    except BrokenExecutor as error:
        raise ResourceError(
            where=what,
            given=f"one of {cores} processes was ended from outside",
            allowed="memory for all of them",
            do="start the same command again with fewer cores (taskset), or with nothing else at work",
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _begin(work: Callable[[Any], Any]) -> None:
    global _work
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that started this one says when to end
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    end_with_launcher()
    _work = work


def _do(stretch: Any) -> Any:
    return _work(stretch)
