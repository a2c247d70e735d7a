"""What GGUF calls the tensors of a language model, and the rows that its `llama` architecture has in another order.

transformers rotates the first half of a head against the second; llama.cpp's `llama` rotates neighbours. The rows of
query and key of each head are therefore interleaved, [0, 1, ..., d-1] becoming [0, d/2, 1, d/2 + 1, ...].
"""

from __future__ import annotations

import torch
from torch import Tensor

_WHOLE = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}
_IN_BLOCK = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_TURNED = ("self_attn.q_proj", "self_attn.k_proj")
_VISION = ("vision_tower", "multi_modal_projector", "image_newline")


def of_vision(name: str) -> bool:
    """Whether a tensor belongs to what sees, not to the language model."""
    return any(part in name.split(".") for part in _VISION)


def gguf_name(name: str) -> str | None:
    """Return what GGUF calls a tensor of a language model; None of one that it has no name for.

    Args:
        name: in the model, with its leaf: `model.layers.0.mlp.up_proj.weight`.
    """
    module, _, leaf = name.removeprefix("model.").removeprefix("language_model.").rpartition(".")
    if module in _WHOLE:
        return f"{_WHOLE[module]}.{leaf}"
    stack, _, rest = module.partition(".")
    number, _, path = rest.partition(".")
    known = stack == "layers" and path in _IN_BLOCK
    return f"blk.{number}.{_IN_BLOCK[path]}.{leaf}" if known else None


def row_order(name: str, rows: int, head_dim: int) -> Tensor | None:
    """Return which row of a query or key each row in GGUF's `llama` is, int64 [rows]; None of any other tensor.

    Args:
        name: of the tensor or of its module, in the model.
        rows: of it.
        head_dim: rows of a head.
    """
    if not any(f"{turned}." in f"{name}." for turned in _TURNED):
        return None
    return torch.arange(rows).view(-1, 2, head_dim // 2).transpose(1, 2).reshape(-1)
