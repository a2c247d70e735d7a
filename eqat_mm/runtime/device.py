"""Which device a process computes on: decided once, and made the current one of the process."""

from __future__ import annotations

import os

import torch

from eqat_kernels import IMPLEMENTATIONS, select
from eqat_mm.errors import ConfigError


def best_device(device: str) -> torch.device:
    """Return the device to compute on; a GPU becomes the current one, on which libraries launch what they are given.

    `cuda` is this process's GPU: of several processes that a launcher started each has its own, otherwise it is the
    first. `auto` is the same, or the CPU where there is none.

    Raises:
        ConfigError: unknown, not on this machine, or not one that the kernels named by `EQAT_KERNELS` run on.
    """
    chosen = _chosen(device, torch.cuda.device_count())
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    require_kernels(chosen)
    return chosen


def require_kernels(device: torch.device) -> None:
    """Check that the kernels that the environment asks for run on a device.

    Raises:
        ConfigError: they do not, or there are none of that name.
    """
    asked = os.environ.get("EQAT_KERNELS", "auto")
    if asked == "auto":
        return
    for op, names in IMPLEMENTATIONS.items():
        try:
            select(op, "auto", torch.empty(0, device=device))
        except ValueError as error:
            raise ConfigError(
                where="EQAT_KERNELS",
                given=f"{asked}: {error}",
                allowed=", ".join(("auto", *names)),
                do="unset EQAT_KERNELS, or choose kernels that run on this device",
            ) from error


def launched() -> bool:
    """Whether a launcher started this process."""
    return "LOCAL_RANK" in os.environ


def processes() -> int:
    """Return how many processes a launcher started, 1 where there is none."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def _chosen(device: str, gpus: int) -> torch.device:
    numbered = [f"cuda:{index}" for index in range(gpus)]
    if device == "auto" and not gpus:
        return torch.device("cpu")
    if device in ("auto", "cuda") and gpus:
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % gpus)
    allowed = ["cpu", *(["cuda"] if gpus else []), *numbered]
    if device not in allowed:
        raise ConfigError("--device", repr(device), f"{', '.join(allowed)} or auto", "choose one of these")
    return torch.device(device)
