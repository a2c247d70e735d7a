"""What a card, or the CPU of this machine, can do."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import psutil
import torch

from eqat_mm.errors import ConfigError
from eqat_mm.runtime.precision import resolve

CONTEXT = 0.6e9
"""Bytes on a GPU that no tensor gets: the CUDA context, library workspaces."""

PROCESS, FIRST_STEP = 3.0e9, 0.1e9
"""Bytes of a process on a CUDA machine before there is a model, assumed; and of what torch loads at its first step."""

_PRODUCT_SHARE, _COPY_SHARE = 0.794, 0.867
"""Of the published peaks, what an H200 reaches: 785 of 989 TFLOP/s, 4.16 of 4.8 TB/s. Assumed of cards not measured."""


@dataclass(frozen=True)
class Machine:
    """Where a run is planned.

    Attributes:
        name: of the card, or cpu.
        origin: where the rates come from.
        product: FLOP/s of a large matrix product in the training precision.
        copy: bytes/s read and written by a copy within the device's memory.
        link: bytes/s between pinned RAM and the GPU.
        precision: of matrix products.
        process: bytes of RAM of a process before there is a model: Python, torch, transformers.
        memory: bytes on each GPU; None on a CPU.
        gpus: number of GPUs, one process each; of processes on a CPU.
        ram: bytes of RAM that are free; None where it is not this machine.
        disk: bytes of disk that are free; None where it is not this machine.
        drive: bytes/s of writing to disk.
    """

    name: str
    origin: str
    product: float
    copy: float
    link: float
    precision: str
    process: float = PROCESS
    memory: float | None = None
    gpus: int = 1
    ram: float | None = None
    disk: float | None = None
    drive: float = 1.0e9

    @property
    def is_gpu(self) -> bool:
        """Whether training runs on a GPU."""
        return self.memory is not None

    @property
    def usable(self) -> float | None:
        """Bytes on a GPU that tensors can have."""
        return None if self.memory is None else self.memory - CONTEXT


@lru_cache(maxsize=1)
def _cards() -> dict[str, dict[str, Any]]:
    cards: dict[str, dict[str, Any]] = json.loads((files("eqat_mm.plan") / "cards.json").read_text(encoding="utf-8"))
    return cards


def card_names() -> list[str]:
    """Return the cards whose data is shipped, the smallest memory first."""
    return sorted(_cards(), key=lambda name: (_cards()[name]["memory_GiB"], name))


def card(name: str, gpus: int = 1) -> Machine:
    """Return `gpus` cards of a kind in a machine whose RAM and disk are not known.

    Raises:
        ConfigError: no data of such a card.
    """
    if name not in _cards():
        raise ConfigError("--gpu", repr(name), f"{', '.join(card_names())} or cpu", "choose one of these")
    data = _cards()[name]
    measured = data.get("measured", {})
    return Machine(
        name=name,
        origin="measured" if measured else "published peaks times what an H200 reaches of its own",
        product=1e12 * measured.get("product_TFLOPs", data["peak_TFLOPs"] * _PRODUCT_SHARE),
        copy=1e12 * measured.get("copy_TBs", data["peak_TBs"] * _COPY_SHARE),
        link=1e9 * measured.get("pinned_GBs", data["link_GBs"]),
        precision="bfloat16",
        memory=data["memory_GiB"] * 2**30,
        gpus=gpus,
    )


def this_machine(device: torch.device, folder: Path, gpus: int = 1) -> Machine:
    """Return this machine, with what is free in RAM and on the disk of `folder`.

    A CPU is measured once per process (in less than a second); a GPU is looked up by its name.
    """
    machine = _this_card(device) if device.type == "cuda" else _this_cpu()
    existing = next(parent for parent in (folder, *folder.resolve().parents) if parent.exists())
    resident = float(psutil.Process().memory_info().rss)
    process = PROCESS if machine.is_gpu else resident + FIRST_STEP
    free, disk = float(psutil.virtual_memory().available), float(shutil.disk_usage(existing).free)
    return replace(machine, gpus=gpus, process=process, ram=free + resident, disk=disk)


def _this_card(device: torch.device) -> Machine:
    found = torch.cuda.get_device_properties(device)
    words = found.name.lower().split()
    kind = next((name for name in card_names() if any(name in word for word in words)), None)
    if kind is None:
        guess = replace(card("a100"), name=found.name, origin="those of an a100: no data of this card")
        return replace(guess, memory=float(found.total_memory))
    return replace(card(kind), memory=float(found.total_memory))


@lru_cache(maxsize=1)
def _this_cpu() -> Machine:
    precision = resolve("auto", torch.device("cpu"))
    left, right = (torch.randn(1024, 1024).to(getattr(torch, precision)) for _ in range(2))
    source, target = torch.randn(1 << 23), torch.empty(1 << 23)
    return Machine(
        name="cpu",
        origin=f"measured here, {torch.get_num_threads()} threads, {precision}",
        product=2 * 1024**3 / _best(lambda: left @ right),
        copy=2 * source.nbytes / _best(lambda: target.copy_(source)),
        link=float("inf"),
        precision=precision,
    )


def _best(function: Callable[[], object]) -> float:
    """Return the best time within a third of a second, so that others on the machine hardly count."""
    began, times = time.perf_counter(), [float("inf")]
    while time.perf_counter() - began < 0.33:
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)
