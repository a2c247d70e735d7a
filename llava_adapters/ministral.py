"""Ministral, of both generations: the modules of Llama; the first with sliding windows in some blocks."""

from dataclasses import replace

from llava_adapters.llama import ARCH as LLAMA
from llava_adapters.tiny import tiny_causal_lm

ARCH = replace(
    LLAMA,
    name="ministral",
    model_types=("ministral", "ministral3"),
    tiny=lambda: tiny_causal_lm(
        "ministral", head_dim=16, sliding_window=4, layer_types=["sliding_attention", "full_attention"]
    ),
)
"""The declaration; see docs/adding_a_model.md."""
