"""The order in which samples are visited: a pure function of (seed, epoch), so any step can be resumed.

Nothing is remembered between epochs. A run that stops at step 1234 asks for the batches from step
1234 on and sees exactly those it would have seen, without replaying the first 1233.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from eqat_mm.errors import ConfigError
from eqat_mm.runtime.seeding import generator


@dataclass(frozen=True)
class EpochOrder:
    """Shuffled batches of sample indices, a fresh permutation for every epoch.

    Args:
        size: number of samples.
        batch: samples in a batch.
        seed: the seed of the run; each epoch's permutation is keyed by (seed, epoch).
        drop_last: leave out the last batch of an epoch when it is not full.

    Raises:
        ConfigError: `size` or `batch` below 1, or no full batch with `drop_last`.
    """

    size: int
    batch: int
    seed: int
    drop_last: bool = False

    def __post_init__(self) -> None:
        """Check every value."""
        _require_positive("size", self.size)
        _require_positive("batch", self.batch)
        if self.drop_last and self.batch > self.size:
            raise ConfigError(
                "EpochOrder.batch",
                f"{self.batch} with drop_last and only {self.size} samples",
                "a batch no larger than the number of samples",
                "lower the batch size, add samples or set drop_last to false",
            )

    @property
    def steps_per_epoch(self) -> int:
        """Number of batches in one epoch."""
        full, rest = divmod(self.size, self.batch)
        return full + (rest > 0 and not self.drop_last)

    def batches(self, epoch: int) -> list[Tensor]:
        """Return the batches of one epoch: int64 index tensors [batch], the last one maybe shorter."""
        order = torch.randperm(self.size, generator=generator(self.seed, "epoch order", epoch))
        return [order[step * self.batch : (step + 1) * self.batch] for step in range(self.steps_per_epoch)]

    def steps(self, epochs: int, done: int = 0) -> Iterator[tuple[int, int, Tensor]]:
        """Yield (epoch, step in the epoch, int64 indices [batch]) after the first `done` steps.

        Args:
            epochs: number of epochs in the whole run.
            done: steps of the whole run that are already behind, over all epochs.

        Raises:
            ConfigError: `done` is negative.
        """
        if done < 0:
            raise ConfigError("EpochOrder.steps.done", str(done), "0 or more", "pass the finished steps")
        first_epoch, skip = divmod(done, self.steps_per_epoch)
        for epoch in range(first_epoch, epochs):
            for step, indices in list(enumerate(self.batches(epoch)))[skip:]:
                yield epoch, step, indices
            skip = 0


def _require_positive(name: str, value: int) -> None:
    if value < 1:
        raise ConfigError(f"EpochOrder.{name}", str(value), "an integer of 1 or more", f"raise {name}")
