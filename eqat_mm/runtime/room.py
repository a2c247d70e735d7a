"""Whether a job fits the disk and the memory of this machine, before it starts."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from eqat_mm.errors import ResourceError
from eqat_mm.runtime.memory import available_bytes


def require_disk(folder: Path, needed: int, what: str, written: int = 0) -> None:
    """Check that the file system of `folder` has `needed` bytes.

    Args:
        folder: need not exist yet.
        needed: bytes, at the worst moment.
        what: they are for.
        written: bytes of them that are there already, from an earlier start.

    Raises:
        ResourceError: it has not.
    """
    existing = next(parent for parent in (folder, *folder.resolve().parents) if parent.exists())
    free = shutil.disk_usage(existing).free + written
    if free < needed:
        raise ResourceError(
            where=f"{folder} ({what})",
            given=f"{_size(free)} free" + (f", the {_size(written)} of this run included" if written else ""),
            allowed=f"at least {_size(needed)}",
            do="free disk space, choose another --output, or use fewer or shorter calibration samples",
        )


def require_writable(folder: Path) -> None:
    """Check that files can be written into a folder, or it can be made.

    Raises:
        ResourceError: it is a file, or its rights forbid it.
    """
    existing = next(parent for parent in (folder, *folder.resolve().parents) if parent.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise ResourceError(
            where=f"--output {folder}",
            given=f"{existing}, which is no folder" if not existing.is_dir() else f"{existing}, which is read-only",
            allowed="a place that can be written",
            do="choose another --output",
        )


def require_memory(needed: int, what: str) -> None:
    """Check that `needed` bytes of memory are free.

    Raises:
        ResourceError: they are not.
    """
    free = available_bytes()
    if free < needed:
        raise ResourceError(
            where=f"memory of this machine ({what})",
            given=f"{_size(free)} available",
            allowed=f"at least {_size(needed)}",
            do="use --spool disk, --stream_dtype bfloat16, or fewer or shorter calibration samples",
        )


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**27 else f"{count / 2**20:.2f} MiB"
