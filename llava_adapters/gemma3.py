"""Gemma-3 with images: a SigLIP tower; the tokens of an image see one another."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import transformers

from llava_adapters.gemma3_text import FIELDS
from llava_adapters.llava import ARCH as LLAVA
from llava_adapters.tiny_processor import chat_template, seeing_tokenizer
from llava_adapters.tiny_vlm import SIGLIP, text_config, tiny_vlm

IMAGE = "<start_of_image>"


def processor() -> Any:
    """Return a processor for the tiny model: 16 x 16 pixels, four tokens."""
    tokenizer = seeing_tokenizer(image_token="<image_soft_token>", boi_token=IMAGE, eoi_token="<end_of_image>")
    images = transformers.Gemma3ImageProcessor(size={"height": 16, "width": 16})
    return transformers.Gemma3Processor(images, tokenizer, chat_template(IMAGE), image_seq_length=4)


def tiny() -> Any:
    """Return a tiny model and its batches."""
    ids: dict[str, Any] = {"image_token_id": 96, "boi_token_index": 95, "eoi_token_index": 94, "mm_tokens_per_image": 4}
    text = text_config("gemma3_text", **FIELDS)
    return tiny_vlm("gemma3", processor(), text=text, vision=SIGLIP, image=IMAGE, **ids, tie_word_embeddings=False)


ARCH = replace(LLAVA, name="gemma3", model_types=("gemma3",), sums=(), norms=(), tiny=tiny, processor=processor)
"""The declaration; see docs/adding_a_model.md."""
