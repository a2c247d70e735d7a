"""Which dtypes matrix products are really made in: what the kernels are given, and what a dense linear returns."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from eqat_kernels import tensors
from eqat_mm.quant.dynamic_linear import DynamicFakeLinear


def watch_kernels(monkeypatch: pytest.MonkeyPatch) -> set[torch.dtype]:
    """Return the dtypes of products with quantized weights, as they come; every op asks `product_dtype` for its own."""
    seen: set[torch.dtype] = set()
    real = tensors.product_dtype

    def noted(tensor: Tensor) -> torch.dtype:
        dtype = real(tensor)
        seen.add(dtype)
        return dtype

    asking = [module for name, module in sys.modules.items() if name.startswith("eqat_kernels")]
    asking = [module for module in asking if getattr(module, "product_dtype", None) is real]
    assert len(asking) > 1
    for module in asking:
        monkeypatch.setattr(module, "product_dtype", noted)
    return seen


def watch_linears(model: nn.Module) -> set[torch.dtype]:
    """Return the dtypes of what the linears of a model give that are products of torch, as they come."""
    seen: set[torch.dtype] = set()
    for module in model.modules():
        if isinstance(module, nn.Linear | DynamicFakeLinear):
            module.register_forward_hook(lambda _module, _inputs, output: seen.add(output.dtype))
    return seen


def answer_as_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `torch.is_autocast_enabled()`, which asks about CUDA, answer for the CPU, as if that were the GPU."""
    real: Callable[[str], bool] = torch.is_autocast_enabled
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind="cpu": real(kind))
