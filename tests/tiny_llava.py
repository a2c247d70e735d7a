"""A tiny LLaVA in a folder, as the llava-hf repositories lay it out: published names, processor, chat template."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from eqat_mm.blocks.arch import Inputs
from eqat_mm.blocks.source import SINGLE
from llava_adapters.tiny import IMAGE_SIZE, IMAGE_TOKEN, TILES, tiny_llava, tiny_llava_next
from tests.tiny_model import word_tokenizer

CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'user' %}USER: {% else %}ASSISTANT: {% endif %}"
    "{% for part in message.content %}{% if part.type == 'image' %}<image> {% else %}{{ part.text }} {% endif %}"
    "{% endfor %}{% if message.role == 'assistant' %}</s> {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT: {% endif %}"
)


def save_tiny_llava(
    folder: Path, arch: str = "llava", dtype: torch.dtype = torch.bfloat16, **tower: Any
) -> list[Inputs]:
    """Save a random LLaVA with its processor; return batches with and without images.

    Args:
        folder: to be made.
        arch: adapter name, `llava` or `llava_next`.
        dtype: of the weights.
        tower: fields of the configuration of the language tower.
    """
    model, batches = tiny_llava("llama", **tower) if arch == "llava" else tiny_llava_next("mistral", **tower)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for parameter in model.parameters():  # large enough that every part matters
            nn.init.normal_(parameter, std=0.2)
    nn.Module.to(model, dtype)
    model.save_pretrained(folder)  # type: ignore[operator]
    rename_as_published(folder)
    tiny_processor(arch).save_pretrained(folder)
    return batches


def rename_as_published(folder: Path) -> list[str]:
    """Give the tensors that `save_pretrained` of transformers 5 wrote the names in the published files; return them."""
    tensors = {
        name.replace("vision_tower.", "vision_tower.vision_model.", 1): value
        for name, value in load_file(folder / SINGLE).items()
    }
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})
    return sorted(tensors)


def tiny_processor(arch: str = "llava") -> transformers.ProcessorMixin:
    """Return the processor of a tiny LLaVA: words as tokens, images of 16 x 16 pixels."""
    tokenizer = word_tokenizer({IMAGE_TOKEN: "<image>"})
    tokenizer.pad_token = "<unk>"
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
