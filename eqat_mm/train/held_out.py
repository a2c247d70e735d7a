"""Judging a model while it learns, on samples that it does not learn from: loss, and KL to the full-precision model.

What the full-precision model says of the labels is recorded once, before training; the model itself need not stay.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from eqat_mm.runtime.precision import Decided, autocast
from eqat_mm.runtime.progress import progress
from eqat_mm.runtime.room import require_memory
from eqat_mm.train.losses import IGNORED, cross_entropy, kl_divergence, predictions_that_count

Sample = dict[str, Tensor]
Predict = Callable[[Sample, Tensor], Tensor]
"""From a batch and the columns that count to logits [B, C, V]."""


@dataclass
class HeldOut:
    """Samples that nothing is trained on, a share in each process.

    Attributes:
        batches: which samples are in each batch of this process; as many batches in all processes. Below 0 stands the
            number of a sample, -1 - index, that does not count: ZeRO-3 needs all processes in every forward.
        samples: all of them.
        collate: makes a batch.
        every: optimizer steps between two looks.
        wanted: logits of the full-precision model, [labels, V] in float16, for each batch; None leaves the KL out.
    """

    batches: list[list[int]]
    samples: Any
    collate: Callable[[list[Sample]], Sample]
    every: int
    wanted: list[Tensor] | None = None

    @classmethod
    def of(
        cls,
        samples: Any,
        collate: Callable[[list[Sample]], Sample] | None,
        every: int,
        batch_size: int,
        *,
        rank: int = 0,
        world: int = 1,
    ) -> HeldOut:
        """Deal samples to processes."""
        count = len(samples)
        dealt = [list(range(start, min(start + batch_size, count))) for start in range(0, count, batch_size)]
        own = dealt[rank::world]
        if len(own) < len(dealt[::world]):
            own.append([-1 - index for index in dealt[0]])
        return cls(own, samples, collate or transformers.default_data_collator, every)

    @torch.no_grad()
    def record(self, model: nn.Module, device: torch.device, precision: Decided) -> None:
        """Keep what a full-precision model, which is on a device, predicts at the labels.

        Raises:
            ResourceError: there is no room for it.
        """
        wanted: list[Tensor] = []
        for batch in progress(list(self._read()), what="held-out reference", unit="batch"):
            batch = {name: value.to(device) for name, value in batch.items()}
            columns, labels = predictions_that_count(batch["labels"])
            kept = logits_at(model, batch, columns, precision)[labels != IGNORED].half().cpu()
            if not wanted:
                require_memory(
                    kept.nbytes * len(self.batches), "what the full-precision model says of held-out samples"
                )
            wanted.append(kept)
        self.wanted = wanted

    @torch.no_grad()
    def sums(self, predict: Predict, device: torch.device) -> Tensor:
        """Return the sums over the labels here of loss and KL, and their number, float64 [3]."""
        total = torch.zeros(3, dtype=torch.float64, device=device)
        for number, batch in enumerate(self._read()):
            batch = {name: value.to(device) for name, value in batch.items()}
            columns, labels = predictions_that_count(batch["labels"])
            logits, labels = predict(batch, columns)[labels != IGNORED][None], labels[labels != IGNORED][None]
            if self.wanted is None:
                kl = logits.new_zeros(())
            else:
                kl = kl_divergence(logits, self.wanted[number].to(device)[None], labels, 1)
            loss = cross_entropy(logits, labels, 1)
            total += torch.stack([loss.double(), kl.double(), total.new_tensor(labels.numel())])
        return total

    def _read(self) -> Iterator[Sample]:
        return (self.collate([self._sample(index) for index in batch]) for batch in self.batches)

    def _sample(self, index: int) -> Sample:
        sample: Sample = self.samples[index if index >= 0 else -1 - index]
        return sample if index >= 0 else sample | {"labels": torch.full_like(sample["labels"], IGNORED)}


def logits_at(model: Any, inputs: Sample, columns: Tensor, precision: Decided) -> Tensor:
    """Return what a model predicts at some columns of a batch, [B, C, V]."""
    forward = {name: value for name, value in inputs.items() if name != "labels"} | {"logits_to_keep": columns}
    with autocast(precision, columns.device):
        logits: Tensor = model(**forward, use_cache=False).logits
    return logits


def numbers_of(sums: Sequence[float], *, compared: bool) -> dict[str, float]:
    """Return what is logged of the sums of all processes."""
    loss, kl, labels = sums
    return {"held_out_loss": loss / labels} | ({"held_out_kl": kl / labels} if compared else {})
