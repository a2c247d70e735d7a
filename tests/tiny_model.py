"""A tiny Llama in a folder with its tokenizer, and a text for it: what the trainers and the commands are tested on."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import nn
from transformers import PreTrainedTokenizerFast

from eqat_mm.data.windows import TextWindows
from llava_adapters.llama import ARCH
from llava_adapters.tiny import VOCABULARY

WORDS = ("<unk>", "</s>", *(f"w{index}" for index in range(2, VOCABULARY)))
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
    save_tokenizer(model_folder)
    save_text(text)
    return Tiny(model_folder, text)


def save_model(folder: Path, blocks: int, dtype: torch.dtype) -> None:
    """Save a model with weights large enough that its blocks do something."""
    config = ARCH.tiny()[0].config
    config.num_hidden_layers = blocks  # type: ignore[union-attr]
    config.initializer_range = 0.2  # type: ignore[union-attr]
    config.eos_token_id = WORDS.index("</s>")  # type: ignore[union-attr]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(config)  # type: ignore[arg-type]
    nn.Module.to(model, dtype)
    model.save_pretrained(folder)


def save_tokenizer(folder: Path) -> None:
    """Save a tokenizer of 97 words."""
    backend = Tokenizer(WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>")
    tokenizer.save_pretrained(folder)


def save_text(path: Path) -> None:
    """Save documents of random words, two blank lines between them."""
    draw = random.Random(0)
    documents = [" ".join(draw.choices(WORDS[2:], k=WORDS_PER_DOCUMENT)) for _ in range(DOCUMENTS)]
    path.write_text("\n\n\n".join(documents), encoding="utf-8")
