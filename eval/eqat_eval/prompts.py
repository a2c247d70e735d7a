"""From a prompt to what a model takes: plainly, through the chat template, or with images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from eqat_mm.data.batching import Collator
from eqat_mm.data.prompt import Renderer
from eqat_mm.errors import DataError


def encode_prompt(speaker: Any, prompt: str, images: Sequence[Any] = (), *, chat: bool) -> dict[str, Tensor]:
    """Return what a model's forward takes of one prompt: batch of one, on the CPU.

    Args:
        speaker: the model's tokenizer, or the processor of a vision-language model.
        prompt: the text, or with `chat` the user's message.
        images: in mode RGB, with `chat`; they come where the message has `<image>`, or before it.
        chat: wrap the prompt in the chat template, ready for the assistant's turn.

    Raises:
        ConfigError: `chat` without a chat template, or one that refuses the prompt.
        DataError: a prompt without a token, or with more or fewer `<image>` than images.
    """
    renderer = Renderer(speaker)
    text = renderer.text([renderer.asked(prompt, len(images))], answering=True) if chat else prompt
    inputs = renderer.inputs(text, images)
    if not len(inputs["input_ids"]):
        raise DataError(
            where="prompt",
            given=f"{prompt!r}, which has no token",
            allowed="a text of at least one token",
            do="write a longer prompt, or use chat=True",
        )
    return Collator(renderer.tokenizer)([inputs])
