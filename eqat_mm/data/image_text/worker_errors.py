"""Errors on their way out of a worker process of torch's data loader, which keeps nothing of them but their words."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from torch.utils.data import get_worker_info

from eqat_mm.errors import DataError

_ROWS = re.compile(r"  where:   (.*)\n  given:   (.*)\n  allowed: (.*)\n  do:      (.*)", re.DOTALL)


class ToldByWorker(DataError):
    """A `DataError` that torch can make anew from its words; outside of a worker it is one again."""

    def __init__(self, said: str) -> None:
        found = _ROWS.search(said, said.rfind("  where:   "))
        assert found is not None, said
        super().__init__(*(part.strip() for part in found.groups()))
        if get_worker_info() is None:
            self.__class__ = DataError  # type: ignore[assignment]


@contextmanager
def told_outside() -> Iterator[None]:
    """Let a `DataError` of the body keep its four lines where the body is the work of a worker."""
    try:
        yield
    except DataError as error:
        if get_worker_info() is None:
            raise
        raise ToldByWorker(str(error)) from error
