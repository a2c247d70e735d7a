"""Waiting for processes to come and go."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path


def wait_for(happened: Callable[[], bool]) -> bool:
    """Whether something happens soon."""
    deadline = time.monotonic() + 30
    while not happened() and time.monotonic() < deadline:
        time.sleep(0.02)
    return happened()


def alive(process: int) -> bool:
    """Whether a process is there and has not ended."""
    try:
        state = Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"
