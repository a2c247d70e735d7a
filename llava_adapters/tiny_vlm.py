"""Small random vision-language models with the processor that fits: batches are what it makes of texts and images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

import torch
import transformers
from torch import nn

from eqat_mm.blocks.arch import Inputs
from eqat_mm.data.image_text.batching import Collator
from eqat_mm.data.image_text.prompt import Renderer
from eqat_mm.errors import ConfigError
from llava_adapters.tiny import VOCABULARY, random_model, text_batches, tiny_config

SIZES = ((40, 30), (30, 50), (24, 24))
"""Widths and heights of the images of a batch, in pixels: the first two in one sample, the third in another."""

VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}
"""A tiny vision tower: 16 patches of 4 x 4 pixels."""

SIGLIP = VISION | {"model_type": "siglip_vision_model", "vision_use_head": False}


def text_config(model_type: str, **overrides: Any) -> dict[str, Any]:
    """Return the fields of `tiny_config`, with its model type, as they stand in config.json."""
    fields: dict[str, Any] = tiny_config(model_type, **overrides).to_dict()
    return fields


def tiny_vlm(
    model_type: str,
    processor: Any,
    *,
    text: Mapping[str, Any],
    vision: Mapping[str, Any],
    image: str = "<image>",
    **fields: Any,
) -> tuple[nn.Module, list[Inputs]]:
    """Return a random vision-language model and its batches.

    Args:
        model_type: as in config.json.
        processor: fits the model.
        text: configuration of the language tower; two blocks or more.
        vision: configuration of the vision tower.
        image: what the chat template writes for an image, the tokens around it included.
        fields: others of the configuration.

    Returns:
        The model in eval mode, and batches of three samples with two images, one and none: unpadded, padded on the
        left, padded on the right; then those of `text_batches`.

    Raises:
        ConfigError: what reads images is not installed.
    """
    if find_spec("PIL") is None or find_spec("torchvision") is None:
        raise ConfigError(
            f"tiny {model_type}",
            "nothing that reads images is installed",
            "pillow and torchvision",
            "pip install 'eqat-mm[vlm]'",
        )
    config = transformers.AutoConfig.for_model(model_type, text_config=dict(text), vision_config=dict(vision), **fields)
    return random_model(transformers.AutoModelForImageTextToText, config), [
        *image_batches(processor, image),
        *text_batches(),
    ]


def image_batches(processor: Any, image: str = "<image>") -> list[Inputs]:
    """Return batches of a processor's inputs, as `tiny_vlm` has them."""
    shown: tuple[list[Any], ...] = (noise(SIZES[:2]), noise(SIZES[2:]), [])
    ragged = [_sample(processor, image, images, 3) for images in shown]
    longest = max(len(sample["input_ids"]) for sample in ragged)
    even = [
        _sample(processor, image, images, 3 + longest - len(sample["input_ids"]))
        for images, sample in zip(shown, ragged, strict=True)
    ]
    sides = ((even, "right"), (ragged, "left"), (ragged, "right"))
    return [Collator(processor.tokenizer, side)(samples) for samples, side in sides]


def noise(sizes: Sequence[tuple[int, int]]) -> list[Any]:
    """Return images of these widths and heights; no two pixels of one are alike."""
    from PIL import Image

    draw = torch.Generator().manual_seed(3)
    pixels = [torch.randint(0, 256, (height, width, 3), generator=draw, dtype=torch.uint8) for width, height in sizes]
    return [Image.fromarray(each.numpy()) for each in pixels]


def _sample(processor: Any, image: str, images: Sequence[Any], words: int) -> Inputs:
    """Return what a processor makes of images, each behind a word, and of words."""
    draw = torch.Generator().manual_seed(words)
    ids = torch.randint(2, VOCABULARY // 2, (words,), generator=draw)
    text = " ".join([*(f"w{number + 2} {image}" for number in range(len(images))), *(f"w{token}" for token in ids)])
    return Renderer(processor).inputs(text, images)
