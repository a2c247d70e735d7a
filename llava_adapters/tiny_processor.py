"""Processors for the tiny vision-language models of `tiny`: words as tokens, images of 16 x 16 pixels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

from llava_adapters.tiny import IMAGE_SIZE, IMAGE_TOKEN, TILES, VOCABULARY

WORDS = ("<unk>", "</s>", *(f"w{index}" for index in range(2, VOCABULARY)))
"""What the tokens of a tiny model are called."""

CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'user' %}USER: {% else %}ASSISTANT: {% endif %}"
    "{% for part in message.content %}{% if part.type == 'image' %}<image> {% else %}{{ part.text }} {% endif %}"
    "{% endfor %}{% if message.role == 'assistant' %}</s> {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT: {% endif %}"
)


def chat_template(image: str) -> str:
    """Return `CHAT_TEMPLATE` with something else for an image."""
    return CHAT_TEMPLATE.replace("<image>", image)


def word_tokenizer(special: Mapping[int, str] | None = None, **named: str) -> transformers.PreTrainedTokenizerFast:
    """Return a tokenizer of 97 words.

    Args:
        special: replaces some of them by special tokens.
        named: those of them that the tokenizer is to have as attributes, by name (`image_token="<image>"`).
    """
    words = [(special or {}).get(index, word) for index, word in enumerate(WORDS)]
    backend = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        eos_token="</s>",
        extra_special_tokens=_named(special or {}, named) if named else sorted((special or {}).values()),
    )


def _named(special: Mapping[int, str], named: dict[str, str]) -> dict[str, str]:
    return named | {f"token_{index}": text for index, text in special.items() if text not in named.values()}


def seeing_tokenizer(*special: str, **named: str) -> transformers.PreTrainedTokenizerFast:
    """Return a tokenizer of 97 words, the last ones replaced by special tokens, which pads with `<unk>`.

    Args:
        special: their texts; the first is token 96, the next 95, and so on.
        named: as for `word_tokenizer`.
    """
    texts = dict.fromkeys([*special, *named.values()])
    tokenizer = word_tokenizer({IMAGE_TOKEN - place: text for place, text in enumerate(texts)}, **named)
    tokenizer.pad_token = "<unk>"
    return tokenizer


def tiny_processor(arch: str = "llava") -> transformers.ProcessorMixin:
    """Return the processor of a tiny LLaVA, `llava` or `llava_next`."""
    tokenizer = seeing_tokenizer("<image>")
    tiles = TILES if arch == "llava_next" else None
    return processor_of(tokenizer, CHAT_TEMPLATE, side=IMAGE_SIZE, patch=8, tiles=tiles)


def processor_of(
    tokenizer: transformers.PreTrainedTokenizerFast, template: str, *, side: int, patch: int, tiles: Any = None
) -> transformers.ProcessorMixin:
    """Return the processor of a LLaVA, or of a LLaVA-1.6 that cuts images into tiles.

    Args:
        tokenizer: with a token `<image>`.
        template: of chats.
        side: height and width of what the vision tower sees, in pixels.
        patch: side of a patch.
        tiles: height and width of the grids of tiles.
    """
    size: dict[str, Any] = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    settings: dict[str, Any] = {
        "patch_size": patch,
        "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,
        "chat_template": template,
    }
    if tiles is not None:
        images = transformers.LlavaNextImageProcessor(**size, image_grid_pinpoints=tiles)
        return transformers.LlavaNextProcessor(images, tokenizer, **settings)
    return transformers.LlavaProcessor(transformers.CLIPImageProcessor(**size), tokenizer, **settings)
