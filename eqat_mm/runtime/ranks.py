"""Ranks: the processes that a launcher started for one job, and what they tell each other.

A trainer is handed a `Ranks` and asks no environment. Alone, nothing is sent and nothing is copied.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from eqat_mm.errors import ConfigError, EqatError

T = TypeVar("T")

PATIENCE = timedelta(minutes=30)
"""How long a rank waits for the others; a launcher ends them all when one dies."""

_ADDRESS = ("RANK", "MASTER_ADDR", "MASTER_PORT")


class Ranks:
    """This process and those it shares a job with; as it stands here, there are no others.

    Attributes:
        world: number of ranks.
        rank: number of this one, from 0.
        local: number of ranks on this machine.
    """

    world = 1
    rank = 0
    local = 1

    def sum_(self, value: Tensor) -> Tensor:
        """Replace a tensor, of one shape everywhere, by its sum over the ranks; return it."""
        return value

    def gathered(self, value: T) -> list[T]:
        """Return what each rank gives, in the order of ranks."""
        return [value]

    def barrier(self) -> None:
        """Wait until every rank has come here."""
        self.gathered(None)

    def share(self, count: int) -> range:
        """Return which of `count` samples this rank holds: every `world`-th, so that any stretch of them is divided."""
        return range(self.rank, count, self.world)

    def held(self, samples: Sequence[int]) -> list[int]:
        """Return those of `samples` that this rank holds, each by its place in the rank's share."""
        return [sample // self.world for sample in samples if sample % self.world == self.rank]

    def all_of(self, own: list[T]) -> list[T]:
        """Return one value for each sample of all ranks, of which this rank gives those of its share."""
        if self.world == 1:
            return own
        shares = self.gathered(own)
        return [shares[at % self.world][at // self.world] for at in range(sum(map(len, shares)))]

    def mean(self, own: Tensor) -> float:
        """Return the mean of the values [n] of all ranks."""
        if self.world == 1:
            return own.mean().item()
        total, count = self.sum_(torch.stack([own.sum(), own.new_tensor(len(own))])).tolist()
        return float(total / count)

    def sum_all_(self, values: Sequence[Tensor]) -> None:
        """Replace tensors by their sums over the ranks: one message for each dtype."""
        if self.world == 1:
            return
        buckets: dict[torch.dtype, list[Tensor]] = defaultdict(list)
        for value in values:
            buckets[value.dtype].append(value)
        for bucket in buckets.values():
            summed = self.sum_(torch.cat([value.reshape(-1) for value in bucket]))
            parts = summed.split([value.numel() for value in bucket])
            for value, part in zip(bucket, parts, strict=True):
                value.copy_(part.view(value.shape))

    @torch.no_grad()
    def agree_(self, values: Sequence[Tensor]) -> None:
        """Replace tensors by those of the first rank: machines may differ in the last bit of the same computation."""
        if self.rank > 0:
            for value in values:
                value.zero_()
        self.sum_all_(values)

    def from_first(self, make: Callable[[], T]) -> T:
        """Return what `make` returns on the first rank, where alone it is called.

        Raises:
            EqatError: on the first rank, what `make` raised there.
            SystemExit: on the others, without a word: one process says it.
        """
        value: Any = None
        error: EqatError | None = None
        if self.rank == 0:
            try:
                value = make()
            except EqatError as caught:
                error = caught
        value, failed = self.gathered((value, error is not None))[0]
        if error is not None:
            raise error
        if failed:
            raise SystemExit(2)
        result: T = value
        return result


ALONE = Ranks()
"""The one process of a job without a launcher."""


class LaunchedRanks(Ranks):
    """Ranks with a process group: gloo for what lies on the CPU, NCCL for what lies on a GPU."""

    def __init__(self) -> None:
        self.world = dist.get_world_size()
        self.rank = dist.get_rank()
        self.local = int(os.environ.get("LOCAL_WORLD_SIZE", self.world))

    def sum_(self, value: Tensor) -> Tensor:
        """As `Ranks.sum_`."""
        dist.all_reduce(value)
        return value

    def gathered(self, value: T) -> list[T]:
        """As `Ranks.gathered`."""
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values


def world_size() -> int:
    """Return how many processes a launcher started; 1 without one.

    Raises:
        ConfigError: it does not say how they find each other.
    """
    given = os.environ.get("WORLD_SIZE", "1")
    missing = [name for name in _ADDRESS if name not in os.environ]
    if not given.isdigit() or int(given) < 1 or (int(given) > 1 and missing):
        raise ConfigError(
            where="environment: WORLD_SIZE",
            given=f"{given}, without {', '.join(missing)}" if missing else repr(given),
            allowed=f"what a launcher sets: WORLD_SIZE of 1 or more, {', '.join(_ADDRESS)}",
            do="start it with torchrun or accelerate launch, or unset WORLD_SIZE for one process",
        )
    return int(given)


def own_device(device: str) -> str:
    """Return the device of this process: of several on GPUs, each has its own.

    Raises:
        ConfigError: one GPU is named for several processes.
    """
    if world_size() == 1 or device == "cpu" or not torch.cuda.is_available():
        return device
    if device not in ("auto", "cuda"):
        raise ConfigError(
            where=f"--device {device}",
            given=f"one device for {world_size()} processes",
            allowed="auto, cuda or cpu: each process takes the GPU of its number",
            do="leave --device out, and choose GPUs with CUDA_VISIBLE_DEVICES",
        )
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}"


@contextmanager
def launched_ranks(device: torch.device) -> Iterator[Ranks]:
    """Join the processes that a launcher started, if one did.

    Args:
        device: of this process; sums of what lies there go over NCCL where it is a GPU.

    Raises:
        ConfigError: the others cannot be found.
    """
    if world_size() == 1:
        yield ALONE
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
    except (RuntimeError, ValueError) as error:
        raise ConfigError(
            where=f"process {os.environ['RANK']} of {world_size()}",
            given=" ".join(str(error).split())[:200],
            allowed=f"{world_size()} processes that meet at {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}",
            do="start them all with one launcher, as torchrun --nproc_per_node N, or unset WORLD_SIZE for one process",
        ) from error
    yield LaunchedRanks()
    dist.destroy_process_group()  # not after an error: the others may not come any more
