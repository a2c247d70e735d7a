"""transformers' attention function over a cache of integers: rows of bytes in place of keys and values.

While a few tokens are written, attention reads the integers themselves (`eqat_kernels.cached_attention`). Whatever that
op does not know (a prompt, position biases, dropout) expands the cache and calls torch's attention, as does all that is
not a row of bytes, such as the states of a vision tower.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from eqat_kernels.cached_attention import FEW, cached_attention
from eqat_kernels.cached_attention.reference import SCALE_BYTES, unpack_rows

NAME = "eqat_integers"


def reads_integers(model: nn.Module) -> bool:
    """Let the attention of a model read rows of bytes; say whether it can."""
    if not isinstance(model, transformers.PreTrainedModel) or not model._can_set_attn_implementation():
        return False
    if model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(NAME)
    return bool(model.config._attn_implementation == NAME)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend as transformers' `sdpa_attention_forward` does; keys and values may be rows of bytes.

    Args:
        module: the attention module that calls.
        query: float [B, H, Q, D].
        key: float [B, K, T, D], or uint8 [B, K, T, D * bits / 8 + 2].
        value: the same.
        attention_mask: None, or of torch's attention; broadcast to [B, H, Q, T].
        dropout: of torch's attention.
        scaling: factor of the logits; None is 1 / sqrt(D).
        **kwargs: of torch's attention.

    Returns:
        [B, Q, H, D], and None for the weights.
    """
    if key.dtype is torch.uint8:
        channels = query.shape[-1]
        bits = (key.shape[-1] - SCALE_BYTES) * 8 // channels
        if _few(query, key, attention_mask) and not dropout and kwargs.get("position_bias") is None:
            factor = channels**-0.5 if scaling is None else scaling
            found = cached_attention(query, key, value, bits, attention_mask, factor)
            return found.transpose(1, 2).contiguous(), None
        key, value = (unpack_rows(rows, bits, query.dtype) for rows in (key, value))
    given = {"dropout": dropout, "scaling": scaling, **kwargs}
    found, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **given)
    return found, None


def _few(query: Tensor, keys: Tensor, mask: Tensor | None) -> bool:
    """Say whether expanding a head is more work than its queries; several of these need a mask, being causal."""
    _, heads, queries, _ = query.shape
    return queries * heads <= FEW * keys.shape[1] and (queries == 1 or mask is not None)


transformers.AttentionInterface.register(NAME, attention)
transformers.AttentionMaskInterface.register(NAME, sdpa_mask)
