"""From a prompt to what a model takes: plainly, through the tokenizer's chat template, or with images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from eqat_mm.errors import ConfigError, DataError


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str, *, chat: bool) -> Tensor:
    """Return the token ids of one prompt, int64 [1, T] on the CPU.

    Args:
        tokenizer: adds its own special tokens (a beginning-of-text token, say).
        prompt: the text, or with `chat` the user's message.
        chat: wrap the prompt in the tokenizer's chat template, ready for the assistant's turn.

    Raises:
        ConfigError: `chat` with a tokenizer that has no chat template.
        DataError: a prompt without a token.
    """
    ids = _chat_ids(tokenizer, prompt) if chat else list(tokenizer(prompt)["input_ids"])
    if not ids:
        raise DataError(
            where="prompt",
            given=f"{prompt!r}, which has no token",
            allowed="a text of at least one token",
            do="write a longer prompt, or use chat=True",
        )
    return torch.tensor([ids])


def encode_image_prompt(processor: Any, prompt: str, images: Sequence[Any]) -> dict[str, Tensor]:
    """Return what a vision-language model's forward takes, batch of one, ready for the assistant's turn.

    Args:
        processor: with a chat template.
        prompt: the user's message.
        images: in mode RGB; they come before the message.

    Raises:
        ConfigError: the processor has no chat template.
    """
    if not processor.chat_template:
        raise ConfigError(
            where="processor",
            given=f"{type(processor).__name__} without a chat template",
            allowed="the processor of a vision-language model, with its chat template",
            do="put chat_template.jinja beside the weights",
        )
    content = [*({"type": "image"} for _ in images), {"type": "text", "text": prompt}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    begin = processor.tokenizer.bos_token
    starts = begin is not None and text.startswith(begin)  # a template may have written the first token itself
    inputs = processor(text=[text], images=list(images) or None, return_tensors="pt", add_special_tokens=not starts)
    return dict(inputs)


def _chat_ids(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    if not tokenizer.chat_template:
        raise ConfigError(
            where="chat",
            given=f"chat=True with a tokenizer that has no template: {tokenizer.name_or_path or 'unnamed'}",
            allowed="a tokenizer with a chat template, or chat=False",
            do="use the tokenizer of the instruction-tuned model, or pass chat=False for a base model",
        )
    conversation = [{"role": "user", "content": prompt}]
    encoding: Any = tokenizer.apply_chat_template(conversation, add_generation_prompt=True, return_dict=True)
    return list(encoding["input_ids"])
