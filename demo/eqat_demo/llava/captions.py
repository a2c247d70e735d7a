"""Words for the images of easy-VQA, for its projector to start near.

Axes: N images, P patches (16), D hidden size of the language model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

CAPTION = (" a", " {colour}", " {shape}", ",")


def captions(
    language: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, contents: Sequence[tuple[str, str]], patches: int
) -> Tensor:
    """Return the embeddings of `CAPTION` about each image, repeated over its patches: (N, P, D)."""
    words: Any = language.get_input_embeddings()

    def embedded(word: str) -> Tensor:
        mean: Tensor = words.weight[tokenizer(word, add_special_tokens=False)["input_ids"]].mean(0)
        return mean  # " teal" is two tokens

    with torch.no_grad():
        caption_of = {
            (colour, shape): torch.stack([embedded(word.format(colour=colour, shape=shape)) for word in CAPTION])
            for colour, shape in set(contents)
        }
    return torch.stack([caption_of[content] for content in contents]).repeat(1, patches // len(CAPTION), 1)
