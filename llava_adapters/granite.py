"""Granite: the modules of Llama, with factors on embedding, attention, residual sums and logits."""

from dataclasses import replace

from llava_adapters.llama import ARCH as LLAMA
from llava_adapters.tiny import tiny_causal_lm

ARCH = replace(
    LLAMA,
    name="granite",
    model_types=("granite",),
    sums=(),  # what is added is scaled
    tiny=lambda: tiny_causal_lm(
        "granite", embedding_multiplier=12.0, attention_multiplier=0.1, residual_multiplier=0.22, logits_scaling=8.0
    ),
)
"""The declaration; see docs/adding_a_model.md."""
