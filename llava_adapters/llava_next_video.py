"""LLaVA-NeXT-Video, for images: as LLaVA-1.6."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import transformers

from llava_adapters.llava_next import ARCH as LLAVA_NEXT
from llava_adapters.tiny import TILES, tiny_vision_config
from llava_adapters.tiny_processor import CHAT_TEMPLATE, seeing_tokenizer
from llava_adapters.tiny_vlm import text_config, tiny_vlm


def processor() -> Any:
    """Return a processor for the tiny model: tiles of 16 x 16 pixels, four tokens to a tile."""
    size: dict[str, Any] = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    return transformers.LlavaNextVideoProcessor(
        transformers.LlavaNextVideoVideoProcessor(**size),
        transformers.LlavaNextImageProcessor(**size, image_grid_pinpoints=TILES),
        seeing_tokenizer("<image>", "<video>"),
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def tiny() -> Any:
    """Return a tiny model and its batches."""
    ids: dict[str, Any] = {"image_token_index": 96, "video_token_index": 95}
    vision = tiny_vision_config().to_dict()
    return tiny_vlm(
        "llava_next_video", processor(), text=text_config("llama"), vision=vision, image_grid_pinpoints=TILES, **ids
    )


ARCH = replace(LLAVA_NEXT, name="llava_next_video", model_types=("llava_next_video",), tiny=tiny, processor=processor)
"""The declaration; see docs/adding_a_model.md."""
