"""Steps of the end-to-end trainers whose loss or gradient is not finite: skipped, counted, said, and bounded.

A skipped step changes nothing: no weight, no moment, no step count of the optimizer. A loss that is not finite makes
its gradients so, and gradients are summed over processes: all of them skip the same steps.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from eqat_mm.errors import TrainingError

IN_A_ROW = 8
"""Skipped steps, one after the other, that training goes on behind."""

IN_TOTAL = 64
"""Skipped steps of one start of a run that training goes on behind."""


@dataclass
class Count:
    """Steps, as they come.

    Attributes:
        taken: steps that changed something.
        skipped: steps that did not.
        in_a_row: skipped ones since the last that was taken.
        unlogged: `taken` and `skipped` since the last line of the log.
    """

    taken: int = 0
    skipped: int = 0
    in_a_row: int = 0
    unlogged: list[int] = field(default_factory=lambda: [0, 0])

    def add(self, *, finite: bool) -> None:
        """Count a step."""
        self.taken += finite
        self.skipped += not finite
        self.in_a_row = 0 if finite else self.in_a_row + 1
        self.unlogged[not finite] += 1

    @property
    def too_many(self) -> bool:
        """Whether training makes no sense any more."""
        return self.in_a_row > IN_A_ROW or self.skipped > IN_TOTAL

    def correct(self, record: dict[str, Any]) -> None:
        """Make a record of the log, for which skipped steps are losses of 0, one of the steps that were taken."""
        if "loss" in record:
            taken, skipped = self.unlogged
            self.unlogged = [0, 0]
            record |= {"loss": _mean(record["loss"], taken, skipped)} | ({"skipped": skipped} if skipped else {})
        if "train_loss" in record:
            record["train_loss"] = _mean(record["train_loss"], self.taken, self.skipped)
        if not math.isfinite(record.get("grad_norm") or 0.0):
            record["grad_norm"] = None


def _mean(loss: float, taken: int, skipped: int) -> float | None:
    if not skipped:
        return loss
    return loss * (taken + skipped) / taken if taken else None


class Remembered(Dataset[dict[str, Tensor]]):
    """Samples of a data set, and the numbers of those that were read last.

    Args:
        samples: the data set.
        kept: how many are remembered.
    """

    def __init__(self, samples: Any, kept: int) -> None:
        self.samples = samples
        self.kept = kept
        self._recent: OrderedDict[int, Tensor] = OrderedDict()

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        sample: dict[str, Tensor] = self.samples[index]
        self._recent[index] = torch.as_tensor(sample["input_ids"])
        if len(self._recent) > self.kept:
            self._recent.popitem(last=False)
        return sample

    def numbers_of(self, batches: Iterable[Tensor]) -> list[int]:
        """Return the numbers of the samples in batches of token ids [B, T], which may be padded."""
        rows = [row.cpu() for batch in batches for row in batch]
        return sorted(number for number, ids in self._recent.items() if any(_is_in(ids, row) for row in rows))


def _is_in(ids: Tensor, row: Tensor) -> bool:
    count = len(ids)
    return count <= len(row) and (ids.equal(row[:count]) or ids.equal(row[-count:]))


def first_non_finite(tensors: Iterable[tuple[str, Tensor]]) -> str | None:
    """Return the name of the first tensor that is not finite; the device is waited for once."""
    floats = [(name, value) for name, value in tensors if value.is_floating_point()]
    if not floats:
        return None
    finite = torch.stack([value.isfinite().all() for _, value in floats]).tolist()
    return next((name for (name, _), good in zip(floats, finite, strict=True) if not good), None)


def broken_tensor(where: str, name: str) -> TrainingError:
    """Return the error of a model that was not finite before it was trained."""
    return TrainingError(
        where=f"{where}: {name}",
        given="a tensor of the model that is not finite, and that no training has touched",
        allowed="finite numbers: no learning rate makes up for these",
        do="make the model again, from a source without NaN or infinity in this tensor",
    )


def broken_samples(where: str, samples: list[int], skipped: int) -> TrainingError:
    """Return the error of a run in which no step gave finite numbers, from a finite model."""
    named = f"samples {', '.join(map(str, samples[:8]))} of the training data" if samples else "the last step's samples"
    return TrainingError(
        where=f"{where}: {named}",
        given=f"a loss or gradient that is not finite in {skipped} of {skipped} steps, before anything was trained",
        allowed="finite numbers from a finite model",
        do="look at these samples, or train with --precision float32; no learning rate helps before the first step",
    )


def diverged(where: str, given: str, rate: float, checkpoint: Path | None) -> TrainingError:
    """Return the error of training whose steps were too large.

    Args:
        where: stage, step and tensor.
        given: what was found.
        rate: learning rate that was asked for.
        checkpoint: the last one, which is finite.
    """
    kept = "no checkpoint was saved yet" if checkpoint is None else f"{checkpoint} is finite and is kept"
    again = "" if checkpoint is None else "; the same command tries again from there"
    return TrainingError(
        where=where,
        given=given,
        allowed=f"finite numbers, but for {IN_A_ROW} steps in a row or {IN_TOTAL} in total; {kept}",
        do=f"lower --learning_rate (now {rate:g}) and begin again with --overwrite true, or train with "
        f"--precision float32{again}",
    )
