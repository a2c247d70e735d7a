"""From a prompt to what a model takes: plainly, through the chat template, or with images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from eqat_mm.data.image_text.batching import Collator
from eqat_mm.data.image_text.conversations import Turn
from eqat_mm.data.image_text.prompt import Renderer
from eqat_mm.errors import DataError


def encode_prompt(
    speaker: Any, prompt: str, images: Sequence[Any] = (), *, chat: bool, system: str | None = None
) -> dict[str, Tensor]:
    """Return what a model's forward takes of one prompt: batch of one, on the CPU.

    Args:
        speaker: the model's tokenizer, or the processor of a vision-language model.
        prompt: the text, or with `chat` the user's message.
        images: in mode RGB, with `chat`; they come where the message has `<image>`, or before it.
        chat: wrap the prompt in the chat template, ready for the assistant's turn.
        system: with `chat`, what the system says first; the template's own words, if it has any, by default.

    Raises:
        ConfigError: `chat` without a chat template, or one that refuses the prompt.
        DataError: a prompt without a token, or with more or fewer `<image>` than images.
    """
    renderer = Renderer(speaker)
    if chat:
        return encode_turns(renderer, [*said_first(system), renderer.asked(prompt, len(images))], images)
    return _encoded(renderer, prompt, images)


def said_first(system: str | None) -> list[Turn]:
    """Return the turn of the system, where it says something."""
    return [] if system is None else [Turn("system", system)]


def encode_turns(renderer: Renderer, turns: Sequence[Turn], images: Sequence[Any]) -> dict[str, Tensor]:
    """Return what a model's forward takes of a conversation, ready for the assistant's turn: batch of one, on the CPU.

    Args:
        renderer: of the model.
        turns: what was said.
        images: of all turns, in mode RGB.

    Raises:
        ConfigError: no chat template, or one that refuses the conversation.
        DataError: text that the tokenizer does not know, or an image that the template loses.
    """
    return _encoded(renderer, renderer.text(turns, answering=True), images)


def _encoded(renderer: Renderer, text: str, images: Sequence[Any]) -> dict[str, Tensor]:
    inputs = renderer.inputs(text, images)
    if not len(inputs["input_ids"]):
        raise DataError(
            where="prompt",
            given=f"{text!r:.80}, which has no token",
            allowed="a text of at least one token",
            do="write a longer prompt, or use chat=True",
        )
    return Collator(renderer.tokenizer)([inputs])
