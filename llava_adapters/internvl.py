"""InternVL3 in the layout of transformers: a vision tower of its own, images in tiles; the tower is a Qwen2."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import transformers

from llava_adapters.llava import ARCH as LLAVA
from llava_adapters.tiny_processor import chat_template, seeing_tokenizer
from llava_adapters.tiny_vlm import VISION, text_config, tiny_vlm

IMAGE = "<IMG_CONTEXT>"


def processor() -> Any:
    """Return a processor for the tiny model: tiles of 16 x 16 pixels, four tokens to a tile."""
    size = {"height": 16, "width": 16}
    tokenizer = seeing_tokenizer(
        context_image_token=IMAGE, start_image_token="<img>", end_image_token="</img>", video_token="<video>"
    )
    return transformers.InternVLProcessor(
        transformers.GotOcr2ImageProcessor(size=size, crop_to_patches=True, max_patches=4),
        tokenizer,
        transformers.InternVLVideoProcessor(size=size),
        image_seq_length=4,
        chat_template=chat_template(IMAGE),
    )


def tiny() -> Any:
    """Return a tiny model and its batches."""
    fields: dict[str, Any] = {"image_token_id": 96, "image_seq_length": 4, "tie_word_embeddings": False}
    vision = VISION | {"model_type": "internvl_vision"}
    return tiny_vlm("internvl", processor(), text=text_config("qwen2"), vision=vision, image=IMAGE, **fields)


ARCH = replace(LLAVA, name="internvl", model_types=("internvl",), tiny=tiny, processor=processor)
"""The declaration; see docs/adding_a_model.md."""
