"""Which precision is taken, and that autocast keeps to it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from eqat_mm.runtime import precision
from eqat_mm.runtime.precision import autocast, resolve

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    precision._cpu_prefers_bfloat16.cache_clear()
    yield
    precision._cpu_prefers_bfloat16.cache_clear()


@pytest.mark.parametrize("device", [CPU, CUDA])
def test_a_named_precision_is_taken(device: torch.device) -> None:
    assert resolve("float32", device) == "float32"
    assert resolve("bfloat16", device) == "bfloat16"


@pytest.mark.parametrize(
    ("seconds", "expected"), [(0.5, "bfloat16"), (0.79, "bfloat16"), (0.9, "float32"), (2.0, "float32")]
)
def test_auto_on_a_cpu_takes_the_clearly_faster(monkeypatch: pytest.MonkeyPatch, seconds: float, expected: str) -> None:
    measured: list[torch.dtype] = []

    def product_seconds(dtype: torch.dtype) -> float:
        measured.append(dtype)
        return seconds if dtype is torch.bfloat16 else 1.0

    monkeypatch.setattr(precision, "_product_seconds", product_seconds)
    assert resolve("auto", CPU) == expected
    assert resolve("auto", CPU) == expected
    assert len(measured) == 2


@pytest.mark.parametrize(("supported", "expected"), [(True, "bfloat16"), (False, "float32")])
def test_auto_on_a_gpu_asks_for_real_support(monkeypatch: pytest.MonkeyPatch, supported: bool, expected: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: supported)
    assert resolve("auto", CUDA) == expected


def test_a_product_is_really_timed() -> None:
    assert precision._product_seconds(torch.float32) > 0


def test_autocast_covers_matrix_products_only() -> None:
    x = torch.randn(2, 4)
    with autocast("bfloat16", CPU):
        assert (x @ x.T).dtype is torch.bfloat16
        assert (x + x).dtype is torch.float32
    with autocast("float32", CPU):
        assert (x @ x.T).dtype is torch.float32
