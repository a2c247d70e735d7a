"""In which precision matrix products run, and in which dtype a model holds what is not quantized.

Two things, because what is trained keeps float32 masters: products are float32, or bfloat16 under autocast. float16 is
not offered: with it, small-model training overflows and needs loss scaling.
"""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Literal, get_args

import torch

from eqat_mm.errors import ConfigError

Precision = Literal["auto", "float32", "bfloat16"]
Decided = Literal["float32", "bfloat16"]


def unquantized_dtype(wanted: torch.dtype | Precision, device: torch.device) -> torch.dtype:
    """Return the dtype in which a model on `device` holds what is not quantized, and so its hidden states.

    `auto` is bfloat16 on a GPU that computes in it, otherwise float32. On a CPU it is float32 however fast bfloat16 is
    there: a figure does not depend on the processor.

    Raises:
        ConfigError: another word.
    """
    if isinstance(wanted, torch.dtype):
        return wanted
    if wanted not in get_args(Precision):
        raise ConfigError("dtype", repr(wanted), ", ".join(get_args(Precision)), "choose one of these")
    on_gpu = wanted == "auto" and device.type == "cuda"
    return torch.bfloat16 if wanted == "bfloat16" or (on_gpu and _gpu_has_bfloat16()) else torch.float32


def frozen_dtype(precision: Decided, device: torch.device) -> torch.dtype:
    """Return the dtype of what training in `precision` leaves as it is: `auto`, but float32 where all is to be that."""
    return unquantized_dtype("auto" if precision == "bfloat16" else "float32", device)


def arithmetic(precision: Precision | None, dtype: Precision, device: torch.device) -> tuple[Decided, torch.dtype]:
    """Return the precision of products and the dtype of what is not quantized, of a model that is only used.

    A precision that is asked for decides for both where `dtype` is `auto`; without one, products are made in the dtype.

    Raises:
        ConfigError: float32 products of bfloat16 tensors.
    """
    products = None if precision is None else resolve(precision, device)
    if products == "float32" and dtype == "bfloat16":
        raise ConfigError("--dtype bfloat16", "--precision float32", "one of the two", "leave --precision out")
    kept = unquantized_dtype("float32" if dtype == "auto" and products == "float32" else dtype, device)
    return "bfloat16" if kept is torch.bfloat16 else products or "float32", kept


def resolve(precision: Precision, device: torch.device) -> Decided:
    """Return the precision to use; `auto` takes bfloat16 where its matrix product is faster than float32's.

    On a CPU that is measured once per process (about 0.1 s): processors with AVX512-BF16 or AMX gain a factor of
    two to five, others lose as much. A GPU is asked whether it supports bfloat16.
    """
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bfloat16" if _gpu_has_bfloat16() else "float32"
    return "bfloat16" if _cpu_prefers_bfloat16() else "float32"


def autocast(precision: Decided, device: torch.device) -> AbstractContextManager[object]:
    """Return the context in which a forward runs."""
    if precision == "float32":
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


def _gpu_has_bfloat16() -> bool:
    return bool(torch.cuda.is_bf16_supported(including_emulation=False))


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
