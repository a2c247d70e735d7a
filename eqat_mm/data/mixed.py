"""Windows of text among conversations: samples of one kind, which one order mixes."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils.data import Dataset


class Mixed(Dataset[dict[str, Tensor]]):
    """Conversations, and behind them windows of text, every token of which is a label.

    Args:
        conversations: have `lengths` and `text_only`.
        windows: int64 [n, T].

    Attributes:
        lengths: tokens of each sample.
        text_only: for each sample, whether it has no image.
    """

    def __init__(self, conversations: Any, windows: Tensor) -> None:
        self._conversations = conversations
        self._windows = windows
        self.lengths: list[int] = [*conversations.lengths, *[windows.shape[1]] * len(windows)]
        self.text_only: list[bool] = [*conversations.text_only, *[True] * len(windows)]

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        behind = index - len(self._conversations)
        if behind >= 0:
            return {"input_ids": self._windows[behind], "labels": self._windows[behind]}
        sample: dict[str, Tensor] = self._conversations[index]
        return sample


def windows_beside(conversations: int, share: float) -> int:
    """Return how many windows are nearest to a share of all samples, one at least.

    Args:
        conversations: their number.
        share: of the windows among windows and conversations, above 0 and below 1.
    """
    return max(1, round(conversations * share / (1 - share)))
