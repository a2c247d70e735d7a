"""PaliGemma, of both generations (a Gemma or a Gemma-2 tower): a prompt that sees itself whole, and an answer."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import transformers

from llava_adapters.llava import ARCH as LLAVA
from llava_adapters.tiny_processor import seeing_tokenizer
from llava_adapters.tiny_vlm import SIGLIP, text_config, tiny_vlm


def processor() -> Any:
    """Return a processor for the tiny model: 16 x 16 pixels, 16 tokens."""
    images: Any = transformers.SiglipImageProcessor(size={"height": 16, "width": 16})
    images.image_seq_length = 16
    tokenizer = seeing_tokenizer("<bos>", image_token="<image>")
    tokenizer.bos_token = "<bos>"
    return transformers.PaliGemmaProcessor(images, tokenizer)


def tiny() -> Any:
    """Return a tiny model with the tower of the second generation, and its batches."""
    text = text_config("gemma2", head_dim=16, sliding_window=8, layer_types=["sliding_attention", "full_attention"])
    vision = SIGLIP | {"projection_dim": 64}
    fields: dict[str, Any] = {"image_token_index": 95, "projection_dim": 64, "tie_word_embeddings": False}
    return tiny_vlm("paligemma", processor(), text=text, vision=vision, **fields)


ARCH = replace(LLAVA, name="paligemma", model_types=("paligemma",), sums=(), norms=(), tiny=tiny, processor=processor)
"""The declaration; see docs/adding_a_model.md."""
