"""Mixtral: Mistral with experts in place of the MLP; their router stays in full precision."""

from eqat_mm.blocks.arch import Arch
from llava_adapters.tiny import tiny_causal_lm

EXPERTS = (("mlp.experts.*.gate_proj", "mlp.experts.*.up_proj"), ("mlp.experts.*.down_proj",))

ARCH = Arch(
    name="mixtral",
    model_types=("mixtral",),
    auto_class="AutoModelForCausalLM",
    blocks="model.layers",
    stages=(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("self_attn.o_proj",), *EXPERTS),
    kept=("mlp.gate",),
    sums=(("self_attn.o_proj", "post_attention_layernorm"),),
    norms=(("input_layernorm", "self_attn.q_proj"),),
    full_precision=("model.embed_tokens", "model.norm", "lm_head"),
    tiny=lambda: tiny_causal_lm("mixtral", num_local_experts=4, num_experts_per_tok=2),
)
"""The declaration; see docs/adding_a_model.md."""
