"""A lock that a process holds on a folder for as long as it works there."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from eqat_mm.errors import ConfigError
from eqat_mm.runtime.signals import undisturbed

LOCK = "run.lock"


@contextmanager
def locked(folder: Path, *, shared: bool = False) -> Iterator[None]:
    """Keep other processes off a folder, which is made where it is missing and goes again if it stays empty.

    The lock ends with the process, however that ends, so one that a dead process left is simply taken.

    Args:
        folder: to lock.
        shared: others may hold it, too, if they share it likewise.

    Raises:
        ConfigError: another process holds it; says which.
    """
    missing = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    file = None
    try:
        with undisturbed():
            folder.mkdir(parents=True, exist_ok=True)
            file = _acquired(folder, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
        yield
    finally:
        with undisturbed(), suppress(OSError):
            if file is not None:
                _released(file, folder / LOCK)
            for made in missing:
                made.rmdir()


def _acquired(folder: Path, kind: int) -> IO[str]:
    path = folder / LOCK
    while True:
        file = path.open("a+", encoding="utf-8")
        try:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
        except OSError as error:
            owner = path.read_text(encoding="utf-8", errors="replace").strip() if path.is_file() else ""
            file.close()
            if error.errno in (errno.EAGAIN, errno.EACCES):
                raise _taken(folder, owner) from error
            raise
        if path.is_file() and os.fstat(file.fileno()).st_ino == path.stat().st_ino:
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            file.flush()
            return file
        file.close()  # its owner removed it between the two calls


def _released(file: IO[str], path: Path) -> None:
    """Remove the lock's file, unless others share it."""
    with suppress(OSError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink(missing_ok=True)
    file.close()


def _taken(folder: Path, owner: str) -> ConfigError:
    return ConfigError(
        where=f"--output {folder}",
        given=f"a run that {owner or 'another process'} is working on",
        allowed="one job in a folder at a time",
        do="wait for it or stop it, or give another --output",
    )
