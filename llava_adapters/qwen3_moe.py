"""Qwen3-MoE: Qwen3 with experts in place of the MLP, in some models not in every block."""

from eqat_mm.blocks.arch import Arch
from llava_adapters.llama import STAGES, SUMS
from llava_adapters.mixtral import EXPERTS
from llava_adapters.tiny import tiny_causal_lm

ARCH = Arch(
    name="qwen3_moe",
    model_types=("qwen3_moe",),
    auto_class="AutoModelForCausalLM",
    blocks="model.layers",
    stages=(*STAGES, *EXPERTS),
    kept=("mlp.gate",),
    sums=SUMS,
    norms=(("input_layernorm", "self_attn.q_proj"),),
    full_precision=("model.embed_tokens", "model.norm", "lm_head"),
    tiny=lambda: tiny_causal_lm(
        "qwen3_moe",
        head_dim=16,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        num_hidden_layers=3,
        mlp_only_layers=[1],
    ),
)
"""The declaration; see docs/adding_a_model.md."""
