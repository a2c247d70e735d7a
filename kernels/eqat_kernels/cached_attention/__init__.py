"""Attention of a few new tokens over keys and values that are stored as integers, without expanding them first.

A stored token of a head is a row of bytes: D codes of 4 or 8 bits, then its step size alpha in bfloat16
(`eqat_mm.quant.kv_cache` has the layout). With q_d the query and c_d the codes less the middle one,

    logit_t = scaling * alpha_t * sum_d q_d c_td        output_d = sum_t softmax(logit)_t * alpha_t * c_td

so the integers go into the products as they are, and each step size is one factor of a token.
"""

from __future__ import annotations

from torch import Tensor

from eqat_kernels.dispatch import implementation, select
from eqat_kernels.sizes import check_cached

FEW = 16
"""Queries of a head of the cache up to which expanding it would be most of the work."""


def cached_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    bits: int,
    mask: Tensor | None = None,
    scaling: float = 1.0,
    *,
    impl: str = "auto",
) -> Tensor:
    """Return what the queries read from the cache.

    Args:
        query: float [B, H, Q, D].
        keys: rows of bytes, uint8 [B, K, T, D * bits / 8 + 2], the bytes of a row next to each other; head h of the
            queries reads head h // (H / K).
        values: the same.
        bits: 4 or 8.
        mask: None, bool (True is seen), or what is added to the logits; broadcast to [B, H, Q, T].
        scaling: factor of the logits.
        impl: implementation, see `eqat_kernels.dispatch`.

    Returns:
        [B, H, Q, D] in the dtype of the queries.

    Raises:
        ValueError: sizes that do not fit, or `impl` cannot run.
    """
    check_cached(query, keys, values, bits)
    module = implementation("cached_attention", select("cached_attention", impl, query))
    result: Tensor = module.attend(query, keys, values, bits, mask, scaling)
    return result
