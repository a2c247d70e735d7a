"""Mistral-Small 3.1 and later, and Ministral-3, with images: a Pixtral tower, images of any size."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import transformers

from llava_adapters.llava import ARCH as LLAVA
from llava_adapters.tiny_processor import chat_template, seeing_tokenizer
from llava_adapters.tiny_vlm import VISION, text_config, tiny_vlm

IMAGE = "[IMG]"
PIXTRAL = VISION | {"model_type": "pixtral", "head_dim": 16, "image_size": 64}
"""A tiny Pixtral tower."""


def processor(merged: int = 2) -> Any:
    """Return a processor for the tiny model: patches of 4 x 4 pixels, `merged` x `merged` of them to a token."""
    images = transformers.PixtralImageProcessor(size={"longest_edge": 32}, patch_size=4 * merged)
    return transformers.PixtralProcessor(
        images,
        seeing_tokenizer(IMAGE, "[IMG_BREAK]", "[IMG_END]"),
        patch_size=4,
        spatial_merge_size=merged,
        chat_template=chat_template(IMAGE),
    )


def tiny(tower: str = "mistral", **of_tower: Any) -> Any:
    """Return a tiny model and its batches."""
    fields: dict[str, Any] = {"image_token_index": 96, "spatial_merge_size": 2, "tie_word_embeddings": False}
    text = text_config(tower, head_dim=16, **of_tower)
    return tiny_vlm("mistral3", processor(), text=text, vision=PIXTRAL, image=IMAGE, **fields)


ARCH = replace(LLAVA, name="mistral3", model_types=("mistral3",), tiny=tiny, processor=processor)
"""The declaration; see docs/adding_a_model.md."""
