"""Conversations and windows of text as a blockwise trainer takes them: each a batch of one, in a mixed order.

Blocks are called on samples of one length together. Conversations are therefore filled up on the right, to one of eight
lengths between a power of two and the next: at most an eighth is filling, which the attention mask says.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from eqat_mm.data.image_text.batching import Collator
from eqat_mm.runtime.seeding import generator

Batch = dict[str, Tensor]


class CalibrationSamples(Sequence[Batch]):
    """Conversations and windows, mixed; a conversation is read, and so are its images, when it is asked for.

    Args:
        conversations: samples of tokens [T] and images, with `lengths` and `text_only`.
        windows: int64 [n, T].
        collator: makes a batch of a conversation.
        seed: of the order.

    Attributes:
        lengths: tokens of each sample, the filling counted.
    """

    def __init__(self, conversations: Any, windows: Tensor, collator: Collator, seed: int) -> None:
        self._conversations, self._windows, self._collator = conversations, windows, collator
        own = [filled_length(length) for length in conversations.lengths]
        own += [windows.shape[1]] * len(windows)
        self._order: list[int] = torch.randperm(len(own), generator=generator(seed, "calibration order")).tolist()
        self.lengths = [own[number] for number in self._order]

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, index: Any) -> Any:
        """Return what the model is given of a sample: rows of tokens [1, T, ...], tensors of its images."""
        return {name: value for name, value in self.labelled(index).items() if name != "labels"}

    def with_images(self, most: int) -> list[int]:
        """Return the numbers of the first conversations about images."""
        no_images = [*self._conversations.text_only, *[True] * len(self._windows)]
        return [index for index, number in enumerate(self._order) if not no_images[number]][:most]

    def labelled(self, index: int) -> Batch:
        """Return the same, and the `labels` [1, T]: of a window all its tokens, of a conversation its answers."""
        number = self._order[index] - len(self._conversations)
        if number >= 0:
            window = self._windows[number].unsqueeze(0)
            return {"input_ids": window, "labels": window}
        sample: Batch = self._conversations[self._order[index]]
        return self._collator.filled(sample, filled_length(len(sample["input_ids"])))


def filled_length(tokens: int) -> int:
    """Return the length that a sample of so many tokens is filled up to."""
    step = 1 << max(0, tokens.bit_length() - 4)
    return -(-tokens // step) * step
