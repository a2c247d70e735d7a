"""An image and several questions about it as one piece of a row: the image is read once.

A mask lets each question see its image and itself, nothing of the other questions and images, and every question about
an image starts at the same position id, so each is answered as if it had been asked alone. Short pieces share a row, so
that little of a batch is padding.

Axes: B rows of a batch, L tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from eqat_demo.llava.build import IMAGE_TOKEN, PROMPT

IGNORED = -100
_PREFIX, _PADDING = 0, -1
_ROW = 320
"""Tokens of a row that images share; a longer piece has a row of its own."""

Piece = list[tuple[int, int, int, int]]
"""Of each token: id, segment, position id, next token to predict."""


class Asked(Protocol):
    """A question with its answer, and how readily it is drawn in training."""

    @property
    def question(self) -> str:
        """As the model is asked."""

    @property
    def answer(self) -> str:
        """In full."""

    @property
    def type(self) -> str:
        """Under which its score is reported."""

    @property
    def form(self) -> str:
        """What decides which answers can be expected."""

    @property
    def weight(self) -> float:
        """Beside those of the other questions about its image."""


@dataclass(frozen=True)
class Batch:
    """Packed questions, all of shape (B, L): numbers of images, token ids, segments, positions, next tokens."""

    images: Tensor
    ids: Tensor
    segments: Tensor
    positions: Tensor
    targets: Tensor

    def to(self, device: torch.device) -> Batch:
        """Return it on a device."""
        return Batch(*(getattr(self, field.name).to(device) for field in fields(self)))

    def mask(self) -> Tensor:
        """Which key (last axis) each query may see: (B, 1, L, L)."""
        query, key = self.segments[:, :, None], self.segments[:, None, :]
        same_image = self.images[:, :, None] == self.images[:, None, :]
        allowed = (same_image & ((query == key) | (key == _PREFIX))).tril()
        return allowed[:, None]

    def first_of_answers(self) -> Tensor:
        """Where the first token of an answer is predicted: bool of shape (B, L)."""
        answers = self.targets != IGNORED
        return answers & ~answers.roll(1, dims=1)


class Packer:
    """Turns questions and answers into batches.

    Args:
        tokenizer: one that knows `IMAGE_TOKEN`.
        patches: image tokens an image takes.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, patches: int) -> None:
        self.tokenizer = tokenizer
        self.prompt = PROMPT.replace(IMAGE_TOKEN, IMAGE_TOKEN * patches)
        self._known: dict[str, list[int]] = {}
        self.prefix = self._ids(self.prompt.partition("{question}")[0])

    def batch(self, asked: Sequence[Sequence[Asked]]) -> Batch:
        """Pack what is asked about each image; row by row, the images keep their order."""
        rows: list[list[tuple[int, ...]]] = [[]]
        for image, piece in enumerate(map(self._piece, asked)):
            if rows[-1] and len(rows[-1]) + len(piece) > _ROW:
                rows.append([])
            rows[-1] += [(image, *token) for token in piece]
        columns = zip(*(torch.tensor(row).unbind(1) for row in rows), strict=True)
        padding = (_PADDING, 0, _PADDING, 0, IGNORED)
        padded = [pad_sequence(list(column), True, value) for column, value in zip(columns, padding, strict=True)]
        return Batch(*padded)

    def _piece(self, asked: Sequence[Asked]) -> Piece:
        start = len(self.prefix)
        rows = [(token, _PREFIX, place, IGNORED) for place, token in enumerate(self.prefix)]
        for segment, each in enumerate(asked, start=_PREFIX + 1):
            prompt = self._ids(self.prompt.format(question=each.question))
            assert prompt[:start] == self.prefix, "the tokenizer merges the question with what stands before it"
            answer = self._ids(f" {each.answer}{self.tokenizer.eos_token}")
            inputs = prompt[start:] + answer[:-1]
            targets = [IGNORED] * (len(inputs) - len(answer)) + answer
            rows += [(token, segment, start + k, targets[k]) for k, token in enumerate(inputs)]
        return rows

    def _ids(self, text: str) -> list[int]:
        if text not in self._known:  # each question comes again in every epoch
            self._known[text] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return self._known[text]
