"""Qwen2.5-VL: images of any size, positions in three directions; the projector is a part of the vision tower."""

from __future__ import annotations

from typing import Any

import transformers

from eqat_mm.blocks.arch import Arch
from llava_adapters.llama import NORMS, STAGES, SUMS
from llava_adapters.tiny_processor import chat_template, seeing_tokenizer
from llava_adapters.tiny_vlm import text_config, tiny_vlm

IMAGE = "<|vision_start|> <|image_pad|> <|vision_end|>"
IDS = {"image_token_id": 96, "video_token_id": 95, "vision_start_token_id": 94, "vision_end_token_id": 93}
FULL_PRECISION = ("model.visual", "model.language_model.embed_tokens", "model.language_model.norm", "lm_head")


def processor() -> Any:
    """Return a processor for the tiny model: patches of 4 x 4 pixels, four of them to a token."""
    return processor_of(transformers.Qwen2_5_VLProcessor, transformers.Qwen2VLVideoProcessor)


def processor_of(kind: Any, videos: Any) -> Any:
    """Return a processor of one of these classes."""
    pixels: dict[str, Any] = {"size": {"shortest_edge": 256, "longest_edge": 1024}, "patch_size": 4}
    tokenizer = seeing_tokenizer("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
    return kind(
        transformers.Qwen2VLImageProcessor(**pixels),
        tokenizer,
        videos(**pixels),
        chat_template=chat_template(IMAGE),
    )


def tiny(**fields: Any) -> Any:
    """Return a tiny model and its batches; `fields` are others of its language tower."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 2,
        "patch_size": 4,
        "window_size": 16,
        "out_hidden_size": 64,
        "fullatt_block_indexes": [1],
    }
    text = text_config("qwen2_5_vl_text", rope_parameters=rope, **fields)
    return tiny_vlm("qwen2_5_vl", processor(), text=text, vision=vision, image=IMAGE, **IDS)


ARCH = Arch(
    name="qwen2_5_vl",
    model_types=("qwen2_5_vl",),
    auto_class="AutoModelForImageTextToText",
    blocks="model.language_model.layers",
    stages=STAGES,
    sums=SUMS,
    norms=NORMS,
    projector="model.visual.merger",
    full_precision=FULL_PRECISION,
    tiny=tiny,
    processor=processor,
)
"""The declaration; see docs/adding_a_model.md."""
