"""Attention over a cache of integers: every implementation against one query at a time in float64."""

from __future__ import annotations

import math
import os

import pytest
import torch
from torch import Tensor

from eqat_kernels import cached_attention
from eqat_mm.quant.kv_cache import pack_rows
from tests.tolerances import assert_close

IMPLEMENTATIONS = ["reference", "cpu", *(["triton"] if os.environ.get("TRITON_INTERPRET") == "1" else [])]
DTYPES = [torch.float32, torch.bfloat16]
SHAPES = [(1, 9, 3, 1, 70, 64), (2, 4, 4, 3, 5, 32), (2, 8, 1, 2, 130, 6), (1, 2, 2, 1, 1, 130)]
"""B, H, K, Q, T, D."""


def numbers(rows: Tensor, bits: int) -> list[list[float]]:
    """Return the keys or values of a head, one byte at a time."""
    found = []
    for *codes, low, high in rows.tolist():
        step = torch.tensor((high << 8 | low) << 16, dtype=torch.int64).to(torch.int32).view(torch.float32).item()
        if bits == 4:
            codes = [code for byte in codes for code in (byte & 15, byte >> 4)]
        found.append([(code - (1 << (bits - 1))) * step for code in codes])
    return found


def naive(query: Tensor, keys: Tensor, values: Tensor, bits: int, seen: Tensor | None, scaling: float) -> Tensor:
    """Return what each query reads, one after the other."""
    result = torch.empty(query.shape, dtype=torch.float64)
    group = query.shape[1] // keys.shape[1]
    for b, h, q in torch.cartesian_prod(*map(torch.arange, query.shape[:3])).tolist():
        k, v = (torch.tensor(numbers(rows[b, h // group], bits), dtype=torch.float64) for rows in (keys, values))
        logits = k @ query[b, h, q].double() * scaling
        if seen is not None:
            logits = logits.masked_fill(~seen[b, 0, q], -math.inf)
        result[b, h, q] = logits.softmax(0) @ v
    return result


def problem(shape: tuple[int, ...], bits: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries, and rows with room behind them, as a cache has it."""
    batch, heads, cached, queries, tokens, channels = shape
    keys, values = (pack_rows(torch.randn(batch, cached, tokens + 3, channels), bits)[:, :, :-3] for _ in range(2))
    return torch.randn(batch, heads, queries, channels).to(dtype), keys, values


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_implementation(impl: str, dtype: torch.dtype, bits: int, shape: tuple[int, ...]) -> None:
    query, keys, values = problem(shape, bits, dtype)
    found = cached_attention(query, keys, values, bits, None, 0.3, impl=impl)
    assert found.dtype is dtype
    assert_close(found, naive(query, keys, values, bits, None, 0.3), "matmul", dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16], ids=str)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", [*SHAPES, (1, 32, 8, 1, 5000, 128), (3, 8, 8, 1, 333, 256)], ids=str)
def test_on_the_device(dtype: torch.dtype, bits: int, shape: tuple[int, ...]) -> None:
    query, keys, values = problem(shape, bits, dtype)
    seen = torch.rand(shape[0], 1, shape[3], shape[4]) > 0.1
    wanted = cached_attention(query.double(), keys, values, bits, seen, 0.3, impl="reference")
    on_device = (tensor.cuda() for tensor in (query, keys, values))
    found = cached_attention(*on_device, bits, seen.cuda(), 0.3, impl="triton")
    assert_close(found.cpu(), wanted, "matmul", dtype)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", ["bool", "added"])
def test_masks(impl: str, kind: str) -> None:
    query, keys, values = problem((2, 4, 2, 3, 70, 32), 4, torch.float32)
    seen = torch.rand(2, 1, 3, 70) > 0.4
    seen[0, 0, 0] = False
    seen[0, 0, 0, 69] = True  # a query that sees one token, the last
    mask = seen if kind == "bool" else torch.zeros(seen.shape).masked_fill(~seen, -math.inf)
    found = cached_attention(query, keys, values, 4, mask, 0.3, impl=impl)
    assert_close(found, naive(query, keys, values, 4, seen, 0.3), "matmul", torch.float32)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS[1:])
def test_a_query_that_sees_nothing_reads_zeros(impl: str) -> None:
    query, keys, values = problem((1, 2, 1, 2, 9, 16), 4, torch.float32)
    seen = torch.ones(1, 1, 2, 9, dtype=torch.bool)
    seen[0, 0, 1] = False
    found = cached_attention(query, keys, values, 4, seen, impl=impl)
    assert torch.equal(found[:, :, 1], torch.zeros(1, 2, 16))
    assert found[:, :, 0].isfinite().all()


def test_sizes_are_checked() -> None:
    query, keys, values = problem((1, 4, 2, 1, 9, 16), 4, torch.float32)
    with pytest.raises(ValueError, match="2 bits: choose 4 or 8"):
        cached_attention(query, keys, values, 2)
    with pytest.raises(ValueError, match="keys"):
        cached_attention(query, keys, values, 8)
    with pytest.raises(ValueError, match="values"):
        cached_attention(query, keys, values[:, :, :-1], 4)
    with pytest.raises(ValueError, match="dividing 3"):
        cached_attention(query[:, :3], keys, values, 4)
    with pytest.raises(ValueError, match="queries"):
        cached_attention(query[0], keys, values, 4)
