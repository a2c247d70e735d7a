"""A tiny Llama in a folder with its tokenizer, and a text for it: what the trainers and the commands are tested on."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import LlamaForCausalLM

from eqat_mm.data.text.settings import TextWindows
from llava_adapters.llama import ARCH as LLAMA
from llava_adapters.tiny import tiny_config
from llava_adapters.tiny_processor import WORDS, word_tokenizer

DOCUMENTS = 80
WORDS_PER_DOCUMENT = 30


@dataclass(frozen=True)
class Tiny:
    """Paths of the model folder and of the text."""

    folder: Path
    text: Path

    def windows(self, count: int | None, *, length: int = 16, held_out: bool = False) -> TextWindows:
        """Windows of one side of the text."""
        return TextWindows(str(self.text), part="held_out" if held_out else "train", length=length, count=count)


def save_tiny(folder: Path, *, blocks: int = 2, dtype: torch.dtype = torch.float32) -> Tiny:
    """Save a random Llama (hidden 64, MLP 128, vocabulary 97) and a text with a train and a held-out side."""
    model_folder, text = folder / "tiny-llama", folder / "text.txt"
    save_model(model_folder, blocks, dtype)
    word_tokenizer().save_pretrained(model_folder)
    save_text(text)
    return Tiny(model_folder, text)


def save_model(folder: Path, blocks: int, dtype: torch.dtype) -> None:
    """Save a model with weights large enough that its blocks do something."""
    model = tiny_llama(num_hidden_layers=blocks, eos_token_id=WORDS.index("</s>"))
    nn.Module.to(model, dtype)
    model.save_pretrained(folder)


def tiny_llama(seed: int = 0, kind: type[LlamaForCausalLM] = LlamaForCausalLM, **changes: Any) -> LlamaForCausalLM:
    """Return a random Llama with weights large enough that its blocks do something.

    Args:
        seed: of its weights.
        kind: class of the model.
        changes: fields of its configuration.
    """
    config = tiny_config("llama", **({"initializer_range": 0.2} | changes))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return kind(config)  # type: ignore[arg-type]


def mixed_bits(blocks: int = 2) -> dict[str, int]:
    """Return an allocation for such a Llama: attention at 3 bits, every second MLP at 4, the others at 2."""
    return {
        f"layers.{index}.{path}": 3 if "attn" in path else 2 + 2 * (index % 2)
        for index in range(blocks)
        for path in LLAMA.linears
    }


def save_text(path: Path) -> None:
    """Save documents of random words, two blank lines between them."""
    draw = random.Random(0)
    documents = [" ".join(draw.choices(WORDS[2:], k=WORDS_PER_DOCUMENT)) for _ in range(DOCUMENTS)]
    path.write_text("\n\n\n".join(documents), encoding="utf-8")
