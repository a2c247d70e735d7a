"""Idefics3, and the first SmolVLM: images in tiles, each with its place; the tower is a Llama."""

from __future__ import annotations

from typing import Any

import transformers

from eqat_mm.blocks.arch import Arch
from llava_adapters.llama import NORMS, STAGES, SUMS
from llava_adapters.tiny_processor import CHAT_TEMPLATE, seeing_tokenizer
from llava_adapters.tiny_vlm import VISION, text_config, tiny_vlm

FULL_PRECISION = (
    "model.vision_model",
    "model.connector",
    "model.text_model.embed_tokens",
    "model.text_model.norm",
    "lm_head",
)
SIZE: dict[str, Any] = {"size": {"longest_edge": 32}, "max_image_size": {"longest_edge": 16}}
"""Of tiny images: cut into up to four tiles of 16 x 16 pixels."""


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Return a tokenizer with the tokens around images and tiles."""
    places = [f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2)]
    return seeing_tokenizer(
        "<image>", "<fake_token_around_image>", "<end_of_utterance>", "<global-img>", "<video>", *places
    )


def processor() -> Any:
    """Return a processor for the tiny model: four tokens to a tile."""
    images = transformers.Idefics3ImageProcessor(**SIZE)
    return transformers.Idefics3Processor(images, tokenizer(), image_seq_len=4, chat_template=CHAT_TEMPLATE)


def tiny(model_type: str = "idefics3") -> Any:
    """Return a tiny model and its batches."""
    text = text_config("llama", max_position_embeddings=256)
    return tiny_vlm(model_type, processor(), text=text, vision=VISION, image_token_id=96)


ARCH = Arch(
    name="idefics3",
    model_types=("idefics3",),
    auto_class="AutoModelForImageTextToText",
    blocks="model.text_model.layers",
    stages=STAGES,
    sums=SUMS,
    norms=NORMS,
    projector="model.connector",
    full_precision=FULL_PRECISION,
    tiny=tiny,
    processor=processor,
)
"""The declaration; see docs/adding_a_model.md."""
