"""Qwen2 and Qwen2.5: the modules of Llama, with biases in q, k and v and a sliding window from some layer on."""

from dataclasses import replace

from llava_adapters.llama import ARCH as LLAMA
from llava_adapters.tiny import tiny_causal_lm

ARCH = replace(
    LLAMA,
    name="qwen2",
    model_types=("qwen2",),
    tiny=lambda: tiny_causal_lm("qwen2", use_sliding_window=True, sliding_window=4, max_window_layers=1),
)
"""The declaration; see docs/adding_a_model.md."""
