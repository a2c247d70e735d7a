"""In which precision matrix products run: float32, or bfloat16 under autocast over float32 masters.

float16 is not offered: with it, small-model training overflows and needs loss scaling.
"""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Literal

import torch

Precision = Literal["auto", "float32", "bfloat16"]


def resolve(precision: Precision, device: torch.device) -> Literal["float32", "bfloat16"]:
    """Return the precision to use; `auto` takes bfloat16 where its matrix product is faster than float32's.

    On a CPU that is measured once per process (about 0.1 s): processors with AVX512-BF16 or AMX gain a factor of
    two to five, others lose as much. A GPU is asked whether it supports bfloat16.
    """
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    return "bfloat16" if _cpu_prefers_bfloat16() else "float32"


def autocast(precision: Literal["float32", "bfloat16"], device: torch.device) -> AbstractContextManager[object]:
    """Return the context in which a forward runs."""
    if precision == "float32":
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


@lru_cache(maxsize=1)
def _cpu_prefers_bfloat16() -> bool:
    return _product_seconds(torch.bfloat16) < 0.8 * _product_seconds(torch.float32)


def _product_seconds(dtype: torch.dtype) -> float:
    """Best of five times of a 512 x 1024 x 1024 product."""
    left, right = torch.randn(512, 1024).to(dtype), torch.randn(1024, 1024).to(dtype)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        left @ right
        best = min(best, time.perf_counter() - start)
    return best
