"""Where the projector starts: near the words for what each square shows, and for where it is.

A language model learns for long to tell row and column from the number of an image token; said in words, it compares
them at once. A left letter has the token that begins a word and a right one the token within a word, so that a square
keeps the order of its two.

Axes: N pictures, P squares, D hidden size of the language model.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from eqat_demo.mini_vqa.labels import Square, squares_of
from eqat_demo.mini_vqa.scenes import GRID

_EMPTY = " nothing"
_ROWS = ("one", "two", "three", "four", "five", "six")
_COLUMNS = ("first", "second", "third", "fourth", "fifth", "sixth")


def captions(language: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, contents: Sequence[Any]) -> Tensor:
    """Return for every square the mean embedding of the words for it, as `told` has them: [N, P, D]."""
    weight: Any = language.get_input_embeddings().weight

    @cache
    def embedded(words: tuple[str, ...]) -> Tensor:
        ids = [tokenizer(word, add_special_tokens=False)["input_ids"] for word in words]
        mean: Tensor = weight[list(chain(*ids))].mean(0)
        return mean

    with torch.no_grad():
        return torch.stack([torch.stack([embedded(words) for words in told(content)]) for content in contents])


def told(content: Any) -> list[tuple[str, ...]]:
    """Return the words for each square of a picture, such as " large", " red", " circle", " two", " fourth"."""
    words: dict[Square, list[str]] = {}
    for square, shown in squares_of(content):
        words.setdefault(square, []).extend(_word(kind, value) for kind, value in shown.items())
    for row, column in words:
        words[row, column] += [f" {_ROWS[row]}", f" {_COLUMNS[column]}"]
    return [tuple(dict.fromkeys(words.get(divmod(place, GRID), [_EMPTY]))) for place in range(GRID * GRID)]


def _word(kind: str, value: str) -> str:
    return value if kind == "right letter" else f" {value}"
