"""Tiny packed checkpoints with a tokenizer of pieces of words, as language models have them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from torch import nn

from eqat_mm.blocks.source import open_model
from eqat_mm.quant.spec import QuantSpec
from eqat_mm.train.rtn import run_rtn
from llava_adapters import arch_for
from llava_adapters.tiny import IMAGE_TOKEN, VOCABULARY, tiny_config
from tests.tiny_llava import CHAT_TEMPLATE, processor_of, save_tiny_llava

PROVENANCE = {"command": "rtn", "seed": 0, "config": {"model": "/somewhere/tiny", "output": "/elsewhere"}}
SPECIALS = ["<unk>", "<s>", "</s>"]
_LETTERS = [chr(code) for code in range(ord("a"), ord("z") + 1)]


def byte_tokenizer(image: bool = False) -> transformers.PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of 97 tokens: letters, some pairs of them, digits split."""
    words = [*SPECIALS, "Ġ", *_LETTERS, *"0123456789"]
    merges = [(first, second) for first in "aeiou" for second in "nrst"] + [("Ġ", letter) for letter in _LETTERS]
    words += ["".join(merge) for merge in merges]
    words = words[: VOCABULARY - 2]
    backend = Tokenizer(
        models.BPE({word: row for row, word in enumerate(words)}, [m for m in merges if "".join(m) in words])
    )
    split: list[Any] = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    backend.pre_tokenizer = pre_tokenizers.Sequence(split)
    backend.decoder = decoders.ByteLevel()
    return _finished(backend, words, image)


def sentencepiece_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """A BPE tokenizer with a mark for spaces and bytes to fall back on, as Llama 2 has it."""
    words = [*SPECIALS, *(f"<0x{code:02X}>" for code in range(16)), "▁", *_LETTERS, "an", "and", "▁and"]
    merges = [("a", "n"), ("an", "d"), ("▁", "and")]
    backend = Tokenizer(
        models.BPE({word: row for row, word in enumerate(words)}, merges, byte_fallback=True, unk_token="<unk>")
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return _finished(backend, words, image=False)


def _finished(backend: Tokenizer, words: list[str], image: bool) -> transformers.PreTrainedTokenizerFast:
    more = {"additional_special_tokens": ["<image>"]} if image else {}
    if image:  # the image's token is the last row of the embedding
        backend.add_tokens([f"<extra{row}>" for row in range(len(words), IMAGE_TOKEN)])
    names = dict(zip(("unk_token", "bos_token", "eos_token"), SPECIALS, strict=True))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **names, **more)


def save_llama(folder: Path, kind: str = "llama", **changes: Any) -> None:
    """Save a random language model in bfloat16, whose biases are not zero."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = tiny_config(kind, **({"initializer_range": 0.2, "bos_token_id": 1, "eos_token_id": 2} | changes))
        model = transformers.AutoModelForCausalLM.from_config(config)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                nn.init.normal_(parameter)
    nn.Module.to(model, torch.bfloat16)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}", encoding="utf-8")
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# Tiny\n", encoding="utf-8")


def packed(folder: Path, spec: QuantSpec, kind: str = "llama", **changes: Any) -> Path:
    """Return the checkpoint of a tiny language model."""
    save_llama(folder / "full", kind, **changes)
    return rounded(folder, spec, kind)


def packed_llava(folder: Path, spec: QuantSpec, arch: str = "llava") -> Path:
    """Return the checkpoint of a tiny LLaVA."""
    save_tiny_llava(folder / "full", arch)
    tokenizer = byte_tokenizer(image=True)
    tokenizer.pad_token = "<unk>"
    processor_of(tokenizer, CHAT_TEMPLATE, side=16, patch=8).save_pretrained(folder / "full")
    return rounded(folder, spec, arch)


def rounded(folder: Path, spec: QuantSpec, arch: str) -> Path:
    """Return the checkpoint of the model in `full`, rounded to nearest."""
    opened = open_model(folder / "full", arch_for(arch))
    run_rtn(opened, spec, folder, source=str(folder / "full"), provenance=PROVENANCE)
    return folder / "model"
