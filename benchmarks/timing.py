"""How everything here is timed: in turn, so that noise of the machine meets all sides, and by medians."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from time import perf_counter

import torch


def interleaved(functions: list[Callable[[], object]], repetitions: int) -> list[float]:
    """Return the median seconds of functions called in turn, after one call of each that does not count."""
    times: list[list[float]] = [[] for _ in functions]
    for turn in range(repetitions + 1):
        for function, found in zip(functions, times, strict=True):
            start = perf_counter()
            function()
            if turn:
                found.append(perf_counter() - start)
    return [median(found) for found in times]


def device_seconds(function: Callable[[], object], repetitions: int = 30) -> float:
    """Return the median seconds of a call on the GPU, its second-level cache cleared before each."""
    cache = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    function()
    times = []
    for _ in range(repetitions):
        cache.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return median(times)
