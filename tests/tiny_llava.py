"""A tiny LLaVA in a folder, as the llava-hf repositories lay it out: published names, processor, chat template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from eqat_mm.blocks.arch import Inputs
from eqat_mm.blocks.source import SINGLE
from llava_adapters.tiny import tiny_llava, tiny_llava_next
from llava_adapters.tiny_processor import CHAT_TEMPLATE as CHAT_TEMPLATE
from llava_adapters.tiny_processor import processor_of as processor_of
from llava_adapters.tiny_processor import tiny_processor


def save_tiny_llava(
    folder: Path, arch: str = "llava", dtype: torch.dtype = torch.bfloat16, **tower: Any
) -> list[Inputs]:
    """Save a random LLaVA with its processor, under published names; return batches with and without images.

    Args:
        folder: to be made.
        arch: adapter name, `llava` or `llava_next`.
        dtype: of the weights.
        tower: fields of the configuration of the language tower.
    """
    batches = save_as_transformers_does(folder, arch, dtype, **tower)
    rename_as_published(folder)
    return batches


def save_as_transformers_does(folder: Path, arch: str, dtype: torch.dtype, **tower: Any) -> list[Inputs]:
    """Save as `save_tiny_llava`, but leave it at the mixture of names that transformers 5 writes."""
    model, batches = tiny_llava("llama", **tower) if arch == "llava" else tiny_llava_next("mistral", **tower)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for parameter in model.parameters():  # large enough that every part matters
            nn.init.normal_(parameter, std=0.2)
    nn.Module.to(model, dtype)
    model.save_pretrained(folder)  # type: ignore[operator]
    tiny_processor(arch).save_pretrained(folder)
    return batches


def save_conversations(folder: Path, count: int) -> Path:
    """Save small images with a question and an answer about each, in LLaVA's format; return the file."""
    records = []
    for number in range(count):
        Image.new("RGB", (30 + number, 20), (30 * number, 90, 9)).save(folder / f"{number}.png")
        turns = [{"from": "human", "value": f"<image>\nw{5 + number}"}, {"from": "gpt", "value": f"w{9 + number}"}]
        records.append({"id": str(number), "image": f"{number}.png", "conversations": turns})
    (folder / "mix.json").write_text(json.dumps(records), encoding="utf-8")
    return folder / "mix.json"


def rename_as_published(folder: Path) -> list[str]:
    """Give the tensors that `save_pretrained` of transformers 5 wrote the names in the published files; return them."""
    tensors = {
        name.replace("vision_tower.", "vision_tower.vision_model.", 1): value
        for name, value in load_file(folder / SINGLE).items()
    }
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})
    return sorted(tensors)
