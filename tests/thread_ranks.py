"""Ranks that are threads of one process: what launched processes do, without starting any."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor

from eqat_mm.runtime.ranks import Ranks

T = TypeVar("T")

PATIENCE = 20.0
"""Seconds after which a thread no longer waits for the others."""


class _Table:
    """Where the threads lay down what they tell each other."""

    def __init__(self, world: int) -> None:
        self.places: list[Any] = [None] * world
        self.together = threading.Barrier(world, timeout=PATIENCE)

    def exchange(self, rank: int, value: Any) -> list[Any]:
        self.places[rank] = value
        self.together.wait()
        values = list(self.places)
        self.together.wait()  # nobody lays down the next before all have read this
        return values


class ThreadRanks(Ranks):
    def __init__(self, rank: int, table: _Table) -> None:
        self.rank, self.world, self.local = rank, len(table.places), len(table.places)
        self._table = table

    def sum_(self, value: Tensor) -> Tensor:
        values = self._table.exchange(self.rank, value.detach().clone())
        assert len({(each.shape, each.dtype) for each in values}) == 1
        with torch.no_grad():
            return value.copy_(torch.stack(values).sum(0))

    def gathered(self, value: T) -> list[T]:
        return copy.deepcopy(self._table.exchange(self.rank, value))  # as from another process


def one_at_a_time(work: Callable[..., T]) -> Callable[..., T]:
    """Return `work`, a thread at a time: transformers changes its classes while it loads a model."""
    lock = threading.Lock()

    def locked(*args: Any, **options: Any) -> T:
        with lock:
            return work(*args, **options)

    return locked


def in_threads(world: int, work: Callable[[Ranks], T]) -> list[T]:
    """Do `work` as each of `world` ranks; return the results by rank, or raise what the first raised that failed."""
    table = _Table(world)

    def as_rank(rank: int) -> T:
        try:
            return work(ThreadRanks(rank, table))
        except BaseException:
            table.together.abort()
            raise

    with ThreadPoolExecutor(world) as pool:
        futures = [pool.submit(as_rank, rank) for rank in range(world)]
    errors = [error for error in (future.exception() for future in futures) if error is not None]
    for error in errors:
        if not isinstance(error, threading.BrokenBarrierError):
            raise error
    return [future.result() for future in futures]
