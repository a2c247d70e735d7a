"""Phi-3 and Phi-4: q, k and v in one linear, gate and up in another."""

from dataclasses import replace

from llava_adapters.llama import ARCH as LLAMA
from llava_adapters.tiny import tiny_causal_lm

ARCH = replace(
    LLAMA,
    name="phi3",
    model_types=("phi3",),
    stages=(("self_attn.qkv_proj",), ("self_attn.o_proj",), ("mlp.gate_up_proj",), ("mlp.down_proj",)),
    norms=(("input_layernorm", "self_attn.qkv_proj"), ("post_attention_layernorm", "mlp.gate_up_proj")),
    tiny=lambda: tiny_causal_lm("phi3", pad_token_id=None, sliding_window=4),
)
"""The declaration; see docs/adding_a_model.md."""
