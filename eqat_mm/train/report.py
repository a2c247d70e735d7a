"""What happened to one block, and the losses of its steps, which are read from the device only now and then."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

READ_EVERY = 16
"""Steps between two looks at the losses: each look waits for the device."""


@dataclass
class FitReport:
    """What happened to one block.

    Attributes:
        loss_before: validation loss at initialisation.
        loss_after: validation loss of the kept weights.
        validation: validation loss after each epoch; None where it was not finite.
        training: mean training loss of each epoch; None where every step was skipped.
        steps: optimizer steps.
        tokens: tokens trained on.
        skipped: steps with a non-finite loss.
        retries: rollbacks.
        learning_rate: peak rate of W, with which the last try trained.
    """

    loss_before: float
    loss_after: float
    validation: list[float | None] = field(default_factory=list)
    training: list[float | None] = field(default_factory=list)
    steps: int = 0
    tokens: int = 0
    skipped: int = 0
    retries: int = 0
    learning_rate: float = 0.0

    def relative_error(self, target_square: float) -> float | None:
        """Return the error of the kept weights, relative to targets of this mean square; None where all are 0."""
        return (self.loss_after / target_square) ** 0.5 if target_square else None


class Diverged(Exception):
    """Too many steps with a non-finite loss."""


class Outcomes:
    """Losses of steps, which stay on the device until `READ_EVERY` of them are read at once.

    Args:
        report: counts what was read.
        max_skipped: steps with a non-finite loss that are allowed.
    """

    def __init__(self, report: FitReport, max_skipped: int) -> None:
        self.report = report
        self.max_skipped = max_skipped
        self._skipped = 0
        self._unread: list[tuple[Tensor, int]] = []
        self._losses: list[float] = []

    def add(self, loss: Tensor, tokens: int) -> None:
        """Add a step's loss, NaN where nothing was changed; raise `Diverged` where too many were."""
        self._unread.append((loss, tokens))
        if len(self._unread) == READ_EVERY:
            self._read()

    def mean(self) -> float | None:
        """Return the mean of all finite losses since the last call, if any; raise `Diverged` as `add` does."""
        self._read()
        losses, self._losses = self._losses, []
        return sum(losses) / len(losses) if losses else None

    def _read(self) -> None:
        unread, self._unread = self._unread, []
        for loss, tokens in _on_host(unread):
            if math.isnan(loss):
                self._skipped += 1
                self.report.skipped += 1
            else:
                self._losses.append(loss)
                self.report.steps += 1
                self.report.tokens += tokens
        if self._skipped > self.max_skipped:
            raise Diverged


def _on_host(unread: list[tuple[Tensor, int]]) -> list[tuple[float, int]]:
    if not unread:
        return []
    losses, tokens = zip(*unread, strict=True)
    return list(zip(torch.stack(losses).tolist(), tokens, strict=True))
