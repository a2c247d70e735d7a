"""PaliGemma's conversations: a prompt whose tokens all see one another, and an answer, which alone is learned.

Its processor writes words of its own: the beginning of text behind the images, and a line break behind the prompt. Here
they are part of the rendered text, in which answers are found as in that of any other model; ids, kinds of tokens and
labels are those that the processor gives for the same prompt and `suffix`. In a conversation of several turns all that
was said before is prompt: it reads what comes behind it, so that nothing but the last answer can be learned.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import ProcessorMixin

KINDS = "token_type_ids"
"""Of each token: 0 in the prompt, 1 in the answer."""


def has_prefix(processor: Any) -> bool:
    """Whether a processor's model reads its prompt whole, in both directions."""
    return isinstance(processor, transformers.PaliGemmaProcessor)


def filling_of(processor: Any) -> dict[str, int]:
    """Return what rows of tokens are filled up with, by name, where it is not zero: text alone is no prompt."""
    return {KINDS: 1} if has_prefix(processor) else {}


def framed(processor: Any, text: str, *, answering: bool) -> str:
    """Return a rendered text with what the processor writes into it.

    Args:
        processor: of such a model.
        text: images, and what is said.
        answering: it is a prompt, behind which the answer begins.
    """
    words = text.rpartition(processor.image_token)[2]
    images = text.removesuffix(words)
    return f"{images}{processor.tokenizer.bos_token}{words}" + ("\n" if answering else "")


def answered(sample: dict[str, Tensor], first: int) -> dict[str, Tensor]:
    """Return a sample whose tokens from `first` on are its answer."""
    return sample | {KINDS: (torch.arange(len(sample["input_ids"])) >= first).long()}


def unframed(processor: Any) -> Any:
    """Return a processor without its words, which takes texts about no image, too."""
    make: Any = _Unframed
    return make(processor.image_processor, processor.tokenizer)


class _Unframed(transformers.PaliGemmaProcessor):
    prepare_inputs_layout = ProcessorMixin.prepare_inputs_layout  # type: ignore[assignment]
    validate_inputs = ProcessorMixin.validate_inputs
