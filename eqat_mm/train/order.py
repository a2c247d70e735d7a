"""In which order samples are trained on: the same for any number of processes.

accelerate cuts an order into batches and deals these to the processes. Where the last ones of an epoch are not full, it
begins again at the front, so that more processes see more samples twice. Here blanks fill up, which count for nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from eqat_mm.train.losses import IGNORED


class Order(Protocol):
    """An order of samples that is a function of the epoch."""

    def __len__(self) -> int:
        """Return the number of samples."""

    def __iter__(self) -> Iterator[int]:
        """Yield the samples of the epoch."""

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that is iterated next."""


class Shuffled(Sampler[int]):
    """All samples, shuffled as accelerate would: a function of seed and epoch.

    Args:
        count: number of samples.
        seed: of the order.
    """

    def __init__(self, count: int, seed: int) -> None:
        self.count = count
        self.seed = seed
        self.epoch = 0

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[int]:
        draw = torch.Generator().manual_seed(self.seed + self.epoch)
        return iter(torch.randperm(self.count, generator=draw).tolist())

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that is iterated next."""
        self.epoch = epoch


class Filled(Sampler[int]):
    """An order, filled up with blanks so that every process has as many batches, and all of them are full.

    Args:
        order: of `n` samples; `n` is the blank.
        multiple: samples of one forward in all processes.
    """

    def __init__(self, order: Order, multiple: int) -> None:
        self.order = order
        self.multiple = multiple

    def __len__(self) -> int:
        return math.ceil(len(self.order) / self.multiple) * self.multiple

    def __iter__(self) -> Iterator[int]:
        yield from self.order
        yield from [len(self.order)] * (len(self) - len(self.order))


class WithBlank(Dataset[dict[str, Tensor]]):
    """Samples, and behind them a blank one: the first without its labels.

    Args:
        samples: a data set of `n`.
    """

    def __init__(self, samples: Any) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if index < len(self.samples):
            sample: dict[str, Tensor] = self.samples[index]
            return sample
        first: dict[str, Tensor] = self.samples[0]
        return first | {"labels": torch.full_like(first["labels"], IGNORED)}
