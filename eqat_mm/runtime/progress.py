"""Progress bars with an ETA on everything long; in a log file a line every few seconds instead."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import Any, TextIO, TypeVar

from tqdm import tqdm

T = TypeVar("T")
_QUIET = ContextVar("quiet", default=False)


def interactive() -> bool:
    """Whether progress goes to a terminal."""
    return sys.stderr.isatty() and not _QUIET.get()


def progress(items: Iterable[T], *, what: str, total: int | None = None, unit: str = "it") -> Iterator[T]:
    """Iterate over `items` behind a bar named `what` that shows rate and ETA (on stderr)."""
    if not speaks():
        return iter(items)
    terminal = interactive()
    return iter(
        tqdm(
            items,
            desc=what,
            total=total,
            unit=unit,
            leave=False,
            dynamic_ncols=terminal,
            mininterval=0.2 if terminal else 15.0,
            file=sys.stderr,
        )
    )


def speaks() -> bool:
    """Whether this process talks to the user: of several that a launcher started, only the first does."""
    return os.environ.get("RANK", "0") == "0" and not _QUIET.get()


@contextmanager
def quietly(quiet: bool = True) -> Iterator[None]:
    """Say nothing and show no progress in the body, if `quiet`."""
    before = _QUIET.set(quiet or _QUIET.get())
    try:
        yield
    finally:
        _QUIET.reset(before)


def say(line: str) -> None:
    """Print one line for the user without tearing a progress bar that is on the screen."""
    if not speaks():
        return
    try:
        tqdm.write(line, file=sys.stdout)
        sys.stdout.flush()
    except OSError:  # nobody reads any more, or a log on a full disk: the work goes on
        silence(sys.stdout)


def complain(lines: str) -> None:
    """Print the last lines for the user, on stderr; no progress bar comes after them."""
    with suppress(OSError, ValueError):  # nobody reads, or it is closed
        for bar in list(getattr(tqdm, "_instances", ())):
            bar.close()
        tqdm.write(lines, file=sys.stderr)


def silence(stream: TextIO) -> None:
    """Let a stream that nobody reads any more take everything."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def duration(seconds: float) -> str:
    """Format seconds as `42s`, `3m07s` or `2h05m`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def place(what: str, done: int, total: int) -> str:
    """Format how far a run is: `step  12/2078   0.6%`."""
    return f"{what} {done:>{len(str(total))}}/{total} {done / total:>6.1%}"


def pace(record: Mapping[str, Any]) -> str:
    """Format the learning rate, speed, memory and time left of a record of any trainer's log."""
    skipped = f"  {record['skipped']} skipped" if record.get("skipped") else ""
    return (
        f"lr {record['learning_rate']:.2e}{skipped}  {record['tokens_per_second']:,.0f} tok/s"
        f"  {record['peak_bytes'] / 2**30:.2f} GiB  eta {duration(record['eta_seconds'])}"
    )


def size(amount: int) -> str:
    """Format bytes as `800 B`, `34.1 MB` or `312.4 GB`."""
    for unit, step in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if amount >= step:
            return f"{amount / step:,.1f} {unit}"
    return f"{amount} B"
