"""Where the projector starts: near the words for what each square shows.

Axes: N pictures, P squares, D hidden size of the language model.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from eqat_demo.mini_vqa.labels import NOTHING, squares_of
from eqat_demo.mini_vqa.scenes import GRID

_EMPTY = "nothing"


def captions(language: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, contents: Sequence[Any]) -> Tensor:
    """Return for every square the mean embedding of the words for it, such as " small red circle": [N, P, D]."""
    words: Any = language.get_input_embeddings()

    @cache
    def embedded(text: str) -> Tensor:
        mean: Tensor = words.weight[tokenizer(text, add_special_tokens=False)["input_ids"]].mean(0)
        return mean

    with torch.no_grad():
        return torch.stack([torch.stack([embedded(text) for text in told(content)]) for content in contents])


def told(content: Any) -> list[str]:
    """Return the words for each square of a picture."""
    texts = [f" {_EMPTY}"] * (GRID * GRID)
    pieces: dict[int, list[str]] = {}
    for (row, column), shown in squares_of(content):
        pieces.setdefault(row * GRID + column, []).extend(value for value in shown.values() if value != NOTHING)
    for place, values in pieces.items():
        texts[place] = "".join(f" {value}" for value in dict.fromkeys(values))
    return texts
