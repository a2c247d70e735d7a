"""The launcher that started this process as one of several, such as torchrun or DeepSpeed's."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

_LOOK_EVERY = 1.0  # seconds
_PATIENCE = 5.0  # seconds
_SHARED = Path("/dev/shm")


def is_first() -> bool:
    """Whether this process is the first that a launcher started on this machine, or the only one."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def release_shared_names() -> None:
    """Free what DeepSpeed's processes share on a CPU, 66 MB each, which it leaves in memory; to be called last."""
    place = (str(os.getuid()), os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", ""))
    name = "_".join(("deepspeed_allreduce_buffer", *place, os.environ.get("RANK", "0")))
    (_SHARED / name).unlink(missing_ok=True)


def end_with_launcher() -> None:
    """End this process, as SIGTERM does, when the launcher that started it is gone, whose other processes are left."""
    watched = _launchers()
    if watched:
        threading.Thread(target=_watch, args=(watched,), daemon=True).start()


def _watch(watched: list[int]) -> None:
    while _ancestors(len(watched)) == watched:
        time.sleep(_LOOK_EVERY)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_PATIENCE)
    os.kill(os.getpid(), signal.SIGKILL)  # it waits for the others where no handler runs, as in a collective


def _launchers() -> list[int]:
    """Return the processes above this one that started it as one of several: DeepSpeed's launcher is two."""
    parents = _ancestors(2)
    return parents if len(parents) == 2 and "deepspeed" in _command(parents[1]) else parents[:1]


def _ancestors(count: int) -> list[int]:
    found = [os.getppid()]
    while len(found) < count and (above := _parent(found[-1])) is not None:
        found.append(above)
    return found


def _parent(process: int) -> int | None:
    try:
        return int(Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[1])
    except (OSError, ValueError, IndexError):
        return None


def _command(process: int) -> str:
    try:
        return Path(f"/proc/{process}/cmdline").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
