"""Attention over a cache of integers in Triton: each program reads some tokens of a head, once for all its queries.

The tokens of a head are divided among programs, for at one query there are too few heads to fill a GPU; what each found
is put together by its largest logit and its sum, as in Flash-Decoding. A byte of 4-bit codes holds two channels, so
queries and outputs are kept as even and odd channels; with 8 bits there is one half, of all channels.

Shape letters: M queries of a head of the cache, padded; T tokens; P channels of a half.
"""

# Kernels are written in Triton's language, which has no types for mypy.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

import os
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

TOKENS = 16
"""Tokens that are in registers at a time."""

PROGRAMS = 512
"""Programs that fill a large GPU."""


@triton.jit
def step_size(row_ptr, inside, width):
    """Return alpha [T] from the last two bytes of rows."""
    low = tl.load(row_ptr + width - 2, mask=inside, other=0).to(tl.uint32)
    high = tl.load(row_ptr + width - 1, mask=inside, other=0).to(tl.uint32)
    return ((low << 16) | (high << 24)).to(tl.float32, bitcast=True)


@triton.jit
def centred(byte, half: tl.constexpr, BITS: tl.constexpr, dtype: tl.constexpr):
    """Return the codes of a half of the channels, less the middle one."""
    code = (byte >> (4 * half)) & 15 if BITS == 4 else byte
    return (code.to(tl.float32) - (1 << (BITS - 1))).to(dtype)


@triton.jit
def product(left, right):
    """Return a matrix product of numbers as they are, added up in float32."""
    return tl.dot(left, right, input_precision="ieee")


@triton.jit
def attend_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr, out_ptr, top_ptr, sum_ptr, queries, tokens, share, width, channels, heads, scaling,
    q_head, q_query, k_batch, k_head, k_token, v_batch, v_head, v_token, mask_head, mask_query,
    BITS: tl.constexpr, M: tl.constexpr, T: tl.constexpr, P: tl.constexpr, FACTOR: tl.constexpr,
):  # fmt: skip
    """Write the output, the largest logit and the sum of some tokens of one head for all its queries."""
    head, part, parts = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    at_M, at_P = tl.arange(0, M), tl.arange(0, P)
    rows, inside = at_M < queries, at_P < channels
    step: tl.constexpr = 8 // BITS
    q_at = q_ptr + head * q_head + at_M[:, None] * q_query + at_P[None, :] * step
    q_0 = tl.load(q_at, mask=rows[:, None] & inside[None, :], other=0.0).to(FACTOR)
    q_1 = tl.load(q_at + 1, mask=rows[:, None] & inside[None, :], other=0.0).to(FACTOR) if BITS == 4 else q_0
    k_at = k_ptr + (head // heads) * k_batch + (head % heads) * k_head
    v_at = v_ptr + (head // heads) * v_batch + (head % heads) * v_head
    top = tl.full((M,), float("-inf"), tl.float32)
    total = tl.zeros((M,), tl.float32)
    out_0, out_1 = tl.zeros((M, P), tl.float32), tl.zeros((M, P), tl.float32)
    for begin in range(part * share, tl.minimum((part + 1) * share, tokens), T):
        at_T = begin + tl.arange(0, T)
        there = at_T < tokens
        row = k_at + at_T.to(tl.int64) * k_token
        byte = tl.load(row[:, None] + at_P[None, :], mask=there[:, None] & inside[None, :], other=1 << (BITS - 1))
        logit = product(q_0, tl.trans(centred(byte, 0, BITS, FACTOR)))
        if BITS == 4:
            logit += product(q_1, tl.trans(centred(byte, 1, BITS, FACTOR)))
        logit *= (step_size(row, there, width) * scaling)[None, :]
        if mask_ptr is not None:
            seen = mask_ptr + head * mask_head + at_M[:, None] * mask_query + at_T[None, :]
            logit += tl.load(seen, mask=rows[:, None] & there[None, :], other=0.0)
        logit = tl.where(there[None, :], logit, float("-inf"))
        above = tl.maximum(top, tl.max(logit, 1))
        base = tl.where(above == float("-inf"), 0.0, above)  # where nothing is seen yet
        weight, kept = tl.exp(logit - base[:, None]), tl.exp(top - base)
        top, total = above, total * kept + tl.sum(weight, 1)
        row = v_at + at_T.to(tl.int64) * v_token
        weight = (weight * step_size(row, there, width)[None, :]).to(FACTOR)
        byte = tl.load(row[:, None] + at_P[None, :], mask=there[:, None] & inside[None, :], other=1 << (BITS - 1))
        out_0 = out_0 * kept[:, None] + product(weight, centred(byte, 0, BITS, FACTOR))
        if BITS == 4:
            out_1 = out_1 * kept[:, None] + product(weight, centred(byte, 1, BITS, FACTOR))
    found = (head * parts + part) * queries + at_M
    tl.store(top_ptr + found, top, mask=rows)
    tl.store(sum_ptr + found, total, mask=rows)
    out_at = out_ptr + found[:, None] * (channels * step) + at_P[None, :] * step
    tl.store(out_at, out_0, mask=rows[:, None] & inside[None, :])
    if BITS == 4:
        tl.store(out_at + 1, out_1, mask=rows[:, None] & inside[None, :])


def attend(query: Tensor, keys: Tensor, values: Tensor, bits: int, mask: Tensor | None, scaling: float) -> Tensor:
    """See `eqat_kernels.cached_attention.cached_attention`."""
    batch, heads, tokens, width = keys.shape
    of_head = query.reshape(batch * heads, -1, query.shape[-1])  # queries that read the same head
    queries, channels = of_head.shape[1:]
    parts, share = divided(tokens, batch * heads)
    out = of_head.new_empty(batch * heads, parts, queries, channels, dtype=torch.float32)
    top, total = (out.new_empty(out.shape[:-1]) for _ in range(2))
    added = None if mask is None else _added(mask, (*query.shape[:-1], tokens)).reshape(batch * heads, queries, tokens)
    attend_kernel[(batch * heads, parts)](
        of_head, keys, values, added, out, top, total, queries, tokens, share, width, channels * bits // 8, heads,
        scaling, *of_head.stride()[:2], *keys.stride()[:3], *values.stride()[:3],
        *((0, 0) if added is None else added.stride()[:2]), **tile_of(queries, channels, bits),
        FACTOR=factor(query.dtype), **options(channels, bits),
    )  # fmt: skip
    weight = torch.exp(top - top.amax(1, keepdim=True)).nan_to_num_(0.0)
    weight /= (weight * total).sum(1, keepdim=True).clamp_min_(torch.finfo(torch.float32).tiny)
    return (out * weight[..., None]).sum(1).to(query.dtype).view_as(query)


def tile_of(queries: int, channels: int, bits: int) -> dict[str, Any]:
    """Return the constants of the kernel; a product of matrices has at least 16 rows and columns."""
    padded = [max(16, triton.next_power_of_2(size)) for size in (queries, channels * bits // 8)]
    return {"BITS": bits, "M": padded[0], "T": TOKENS, "P": padded[1]}


def options(channels: int, bits: int) -> dict[str, int]:
    """Return the options of the launch, with which no card spills registers."""
    return {"num_warps": 4 if channels * bits // 8 <= 128 else 8}


def factor(dtype: torch.dtype) -> Any:
    """Return what matrices are multiplied in: the interpreter's numpy has no bfloat16."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    return tl.float32 if interpreted or dtype is torch.float32 else getattr(tl, str(dtype).removeprefix("torch."))


def divided(tokens: int, heads: int) -> tuple[int, int]:
    """Return among how many programs the tokens of a head are divided, and how many each has."""
    pieces = triton.cdiv(tokens, TOKENS)
    each = triton.cdiv(pieces, max(1, min(pieces, PROGRAMS // heads)))
    return triton.cdiv(pieces, each), each * TOKENS


def _added(mask: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return what a mask adds to the logits, of their shape, the tokens of a row next to each other."""
    if mask.dtype is torch.bool:
        mask = torch.zeros_like(mask, dtype=torch.float32).masked_fill_(~mask, float("-inf"))
    return mask.float().expand(shape).contiguous()
