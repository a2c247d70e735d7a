"""SmolLM3: the modules of Llama, without rotary positions in some layers."""

from dataclasses import replace

from llava_adapters.llama import ARCH as LLAMA
from llava_adapters.tiny import tiny_causal_lm

ARCH = replace(
    LLAMA,
    name="smollm3",
    model_types=("smollm3",),
    tiny=lambda: tiny_causal_lm("smollm3", no_rope_layers=[1, 0], pad_token_id=None),
)
"""The declaration; see docs/adding_a_model.md."""
