"""Memory of this process: its peak, and whether freed memory is kept or given back."""

from __future__ import annotations

import ctypes
import resource
import sys

import psutil
import torch

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt, see malloc.h
_LARGEST = 2**31 - 1


def keep_freed_memory() -> bool:
    """Let the C library reuse large freed buffers instead of giving each back to the system; return whether it can.

    Steps that allocate the same hundreds of MiB again and again (logits) otherwise spend their time in page faults:
    15% of an E2E-QP step on the CPU. Only glibc has the switch; elsewhere nothing happens.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return bool(mallopt(_MMAP_THRESHOLD, _LARGEST)) and bool(mallopt(_TRIM_THRESHOLD, _LARGEST))


def release_freed_memory() -> bool:
    """Give freed memory back to the system; return whether any was, False where the C library has no switch for it.

    glibc keeps what lies between blocks in use: after a phase with many short-lived tensors, easily 100 MiB.
    """
    try:
        return bool(ctypes.CDLL(None).malloc_trim(0))
    except (AttributeError, OSError, TypeError):
        return False


def available_bytes() -> int:
    """Memory of this machine that could be used without swapping."""
    return int(psutil.virtual_memory().available)


def peak_bytes(device: torch.device) -> int:
    """Peak memory so far: allocated CUDA memory on a GPU, resident set size on the CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
