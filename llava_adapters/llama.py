"""Llama (also SmolLM2, TinyLlama, Vicuna: everything whose `model_type` is `llama`)."""

from eqat_mm.blocks.arch import Arch
from llava_adapters.tiny import tiny_causal_lm

STAGES = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)

SUMS = (("self_attn.o_proj", "post_attention_layernorm"), ("mlp.down_proj", ""))

NORMS = (("input_layernorm", "self_attn.q_proj"), ("post_attention_layernorm", "mlp.gate_proj"))

ARCH = Arch(
    name="llama",
    model_types=("llama",),
    auto_class="AutoModelForCausalLM",
    blocks="model.layers",
    stages=STAGES,
    sums=SUMS,
    norms=NORMS,
    full_precision=("model.embed_tokens", "model.norm", "lm_head"),
    tiny=lambda: tiny_causal_lm("llama"),
)
"""The declaration; see docs/adding_a_model.md."""
