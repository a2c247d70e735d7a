"""OLMo-2: the linears of Llama, with norms behind attention and MLP in place of those before them."""

from dataclasses import replace

from llava_adapters.llama import ARCH as LLAMA
from llava_adapters.tiny import tiny_causal_lm

ARCH = replace(
    LLAMA,
    name="olmo2",
    model_types=("olmo2",),
    sums=(),
    norms=(),
    tiny=lambda: tiny_causal_lm("olmo2", pad_token_id=None),
)
"""The declaration; see docs/adding_a_model.md."""
