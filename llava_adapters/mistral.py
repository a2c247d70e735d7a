"""Mistral: the modules of Llama, with sliding-window attention in its own forward."""

from eqat_mm.blocks.arch import Arch
from llava_adapters.llama import NORMS, STAGES, SUMS
from llava_adapters.tiny import tiny_causal_lm

ARCH = Arch(
    name="mistral",
    model_types=("mistral",),
    auto_class="AutoModelForCausalLM",
    blocks="model.layers",
    stages=STAGES,
    sums=SUMS,
    norms=NORMS,
    full_precision=("model.embed_tokens", "model.norm", "lm_head"),
    tiny=lambda: tiny_causal_lm("mistral", sliding_window=4),
)
"""The declaration; see docs/adding_a_model.md."""
