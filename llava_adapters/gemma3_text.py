"""Gemma-3 without images: norms before and behind attention and MLP, sliding windows in most blocks."""

from dataclasses import replace

from llava_adapters.llama import ARCH as LLAMA
from llava_adapters.tiny import tiny_causal_lm

FIELDS = {"head_dim": 16, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
"""Of a tiny one's configuration."""

ARCH = replace(
    LLAMA,
    name="gemma3_text",
    model_types=("gemma3_text",),
    sums=(),
    norms=(),  # they multiply by 1 + weight
    tiny=lambda: tiny_causal_lm("gemma3_text", **FIELDS),
)
"""The declaration; see docs/adding_a_model.md."""
