"""Processors of tiny LLaVA models: a BPE tokenizer trained on a few lines, spaces joined to words as in Llama's."""

from __future__ import annotations

import string
from functools import cache
from typing import Any

from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import Metaspace
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from tests.tiny_llava import processor_of

SPECIAL = ("<unk>", "<s>", "</s>", "<pad>", "<image>", "<|end|>")
SIDE = 28  # pixels; four patches of 14
TILES = [[28, 56], [56, 28], [56, 56]]

_IMAGES_THEN_TEXT = (
    "{% for part in message.content if part.type == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message.content if part.type == 'text' %}{{ part.text + gap }}{% endfor %}"
)
VICUNA = (
    "{% set gap = ' ' %}{% for message in messages %}"
    "{% if message.role != 'system' %}{{ message.role.upper() + ': ' }}{% endif %}" + _IMAGES_THEN_TEXT + "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
"""Renders as LLaVA-1.5's: `USER: <image>\\nquestion ASSISTANT: answer `, without an end of turn."""

MISTRAL = (
    "{% set gap = '' %}{% for message in messages %}"
    "{% if message.role == 'user' %}{{ '[INST] ' }}" + _IMAGES_THEN_TEXT + "{{ ' [/INST]' }}"
    "{% elif message.role == 'assistant' %}{{ ' ' + message.content[0].text + '</s> ' }}"
    "{% else %}{{ raise_exception('user and assistant only') }}{% endif %}{% endfor %}"
)
"""Renders as that of LLaVA-1.6 with Mistral: `[INST] <image>\\nquestion [/INST] answer</s> `."""

MARKED = (
    "{% set gap = '' %}{{ '<s>' }}{% for message in messages %}{{ '[' + message.role + ']\n' }}"
    + _IMAGES_THEN_TEXT
    + "{{ '\n<|end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '[assistant]\n' }}{% endif %}"
)
"""Every turn ends in white space and a special token that is not the tokenizer's end of sequence."""


@cache
def _backend() -> Tokenizer:
    backend = Tokenizer(BPE(unk_token="<unk>"))
    backend.pre_tokenizer = Metaspace(prepend_scheme="first")
    backend.decoder = decoders.Metaspace(prepend_scheme="first")
    lines = ["USER: what is it? ASSISTANT: a red cat. USER: is it big? ASSISTANT: yes", "[INST] sure [/INST] no"] * 20
    alphabet = [*string.printable, "▁"]
    trainer = BpeTrainer(vocab_size=400, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(lines, trainer)
    backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", SPECIAL.index("<s>"))])
    return backend


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with `<s>`, `</s>`, `<pad>`, `<image>` and `<|end|>`."""
    return PreTrainedTokenizerFast(
        tokenizer_object=_backend(),
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens=["<image>", "<|end|>"],
    )


def llava_processor(template: str = VICUNA) -> Any:
    """A processor whose images take four tokens each."""
    return processor_of(tiny_tokenizer(), template, side=SIDE, patch=14)


def llava_next_processor(template: str = MISTRAL) -> Any:
    """A processor that cuts images into tiles."""
    return processor_of(tiny_tokenizer(), template, side=SIDE, patch=14, tiles=TILES)
