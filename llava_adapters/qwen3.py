"""Qwen3: the modules of Llama, with norms of queries and keys."""

from dataclasses import replace

from llava_adapters.llama import ARCH as LLAMA
from llava_adapters.tiny import tiny_causal_lm

ARCH = replace(LLAMA, name="qwen3", model_types=("qwen3",), tiny=lambda: tiny_causal_lm("qwen3", head_dim=32))
"""The declaration; see docs/adding_a_model.md."""
