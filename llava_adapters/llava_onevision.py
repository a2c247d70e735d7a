"""LLaVA-OneVision: a SigLIP tower and images in tiles, several images of one conversation in one tile each."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import transformers

from llava_adapters.llava_next import ARCH as LLAVA_NEXT
from llava_adapters.tiny import TILES
from llava_adapters.tiny_processor import CHAT_TEMPLATE, seeing_tokenizer
from llava_adapters.tiny_vlm import SIGLIP, text_config, tiny_vlm


def processor() -> Any:
    """Return a processor for the tiny model: tiles of 16 x 16 pixels, four tokens to a tile."""
    size = {"height": 16, "width": 16}
    return transformers.LlavaOnevisionProcessor(
        transformers.LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=TILES),
        seeing_tokenizer("<image>", "<video>"),
        transformers.LlavaOnevisionVideoProcessor(size=size),
        num_image_tokens=4,
        vision_feature_select_strategy="full",
        chat_template=CHAT_TEMPLATE,
    )


def tiny() -> Any:
    """Return a tiny model and its batches."""
    ids: dict[str, Any] = {"image_token_index": 96, "video_token_index": 95}
    vision = SIGLIP | {"patch_size": 8}
    return tiny_vlm(
        "llava_onevision", processor(), text=text_config("qwen2"), vision=vision, image_grid_pinpoints=TILES, **ids
    )


ARCH = replace(LLAVA_NEXT, name="llava_onevision", model_types=("llava_onevision",), tiny=tiny, processor=processor)
"""The declaration; see docs/adding_a_model.md."""
