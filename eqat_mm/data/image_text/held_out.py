"""Conversations that are kept out of training, to judge a model by while it learns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from eqat_mm.errors import DataError
from eqat_mm.runtime.seeding import generator


class Subset(Dataset[dict[str, Tensor]]):
    """Some samples of a data set of conversations.

    Args:
        data: has `lengths` and `text_only`.
        chosen: which.

    Attributes:
        lengths: tokens of each sample.
        text_only: for each sample, whether it has no image.
    """

    def __init__(self, data: Any, chosen: Sequence[int]) -> None:
        self._data = data
        self._chosen = chosen
        self.lengths: list[int] = [data.lengths[index] for index in chosen]
        self.text_only: list[bool] = [bool(data.text_only[index]) for index in chosen]

    def __len__(self) -> int:
        return len(self._chosen)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        sample: dict[str, Tensor] = self._data[self._chosen[index]]
        return sample


def divided(data: Any, held_out: int, seed: int) -> tuple[Subset, Subset]:
    """Return what of a data set is trained on, in its order, and what is held out, drawn at random.

    Raises:
        DataError: nothing would be left to train on.
    """
    if held_out >= len(data):
        raise DataError(
            "--conversations.held_out",
            f"{held_out:,} of {len(data):,} samples",
            f"0 to {len(data) - 1:,}: some must be left to train on",
            "hold out fewer, or take more records",
        )
    drawn = torch.randperm(len(data), generator=generator(seed, "held-out conversations"))[:held_out].tolist()
    kept_out = set(drawn)
    return Subset(data, [index for index in range(len(data)) if index not in kept_out]), Subset(data, sorted(drawn))
