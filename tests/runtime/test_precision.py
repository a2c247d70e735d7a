"""Which precision is taken, and that autocast keeps to it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from eqat_mm.errors import ConfigError
from eqat_mm.runtime import precision
from eqat_mm.runtime.precision import arithmetic, autocast, frozen_dtype, resolve, unquantized_dtype
from tests.checkpoint.files import assert_four_lines

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


@pytest.fixture(params=[True, False], ids=["new GPU", "old GPU"])
def supported(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the GPU computes in bfloat16; the CPU is much faster with it."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: request.param)
    monkeypatch.setattr(precision, "_product_seconds", lambda dtype: 0.1 if dtype is torch.bfloat16 else 1.0)
    return bool(request.param)


def test_unquantized_parts_are_bfloat16_on_a_gpu_and_float32_on_a_cpu(supported: bool) -> None:
    assert unquantized_dtype("auto", CPU) is torch.float32
    assert unquantized_dtype("auto", CUDA) is (torch.bfloat16 if supported else torch.float32)


@pytest.mark.usefixtures("supported")
@pytest.mark.parametrize("device", [CPU, CUDA])
@pytest.mark.parametrize("name", ["float32", "bfloat16"])
def test_a_named_dtype_is_taken(device: torch.device, name: Any) -> None:
    dtype = getattr(torch, name)
    assert unquantized_dtype(name, device) is dtype
    assert unquantized_dtype(dtype, device) is dtype
    assert unquantized_dtype(torch.float16, device) is torch.float16


def test_an_unknown_dtype_is_refused() -> None:
    with pytest.raises(ConfigError, match="'half'") as raised:
        unquantized_dtype("half", CPU)  # type: ignore[arg-type]
    assert_four_lines(raised.value)


def test_float32_training_is_float32_throughout(supported: bool) -> None:
    assert frozen_dtype("float32", CUDA) is frozen_dtype("float32", CPU) is torch.float32
    assert frozen_dtype("bfloat16", CPU) is torch.float32
    assert frozen_dtype("bfloat16", CUDA) is (torch.bfloat16 if supported else torch.float32)


@pytest.mark.parametrize(
    ("asked", "dtype", "device", "expected"),
    [
        (None, "auto", CPU, ("float32", torch.float32)),
        (None, "auto", CUDA, ("bfloat16", torch.bfloat16)),
        (None, "float32", CUDA, ("float32", torch.float32)),
        (None, "bfloat16", CPU, ("bfloat16", torch.bfloat16)),
        ("float32", "auto", CUDA, ("float32", torch.float32)),
        ("bfloat16", "auto", CPU, ("bfloat16", torch.float32)),
        ("bfloat16", "float32", CUDA, ("bfloat16", torch.float32)),
        ("auto", "auto", CPU, ("bfloat16", torch.float32)),
        ("auto", "auto", CUDA, ("bfloat16", torch.bfloat16)),
    ],
)
def test_precision_and_dtype_of_a_model_that_is_used(
    monkeypatch: pytest.MonkeyPatch, asked: Any, dtype: Any, device: torch.device, expected: Any
) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    monkeypatch.setattr(precision, "_product_seconds", lambda dtype: 0.1 if dtype is torch.bfloat16 else 1.0)
    assert arithmetic(asked, dtype, device) == expected


def test_float32_products_of_bfloat16_tensors_are_refused() -> None:
    with pytest.raises(ConfigError, match="one of the two") as raised:
        arithmetic("float32", "bfloat16", CPU)
    assert_four_lines(raised.value)


def test_a_product_is_really_timed() -> None:
    assert precision._product_seconds(torch.float32) > 0


def test_autocast_covers_matrix_products_only() -> None:
    x = torch.randn(2, 4)
    with autocast("bfloat16", CPU):
        assert (x @ x.T).dtype is torch.bfloat16
        assert (x + x).dtype is torch.float32
    with autocast("float32", CPU):
        assert (x @ x.T).dtype is torch.float32
