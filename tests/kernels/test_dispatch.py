"""The choice of an implementation: visible, overridable, and never silently another one."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import torch

from eqat_kernels import IMPLEMENTATIONS, dequantize, dispatch, fake_quantize, quant_linear, select
from tests.kernels.naive import random_packed_weight

OPS = sorted(IMPLEMENTATIONS)
TENSOR = torch.zeros(1)


@pytest.fixture(autouse=True)
def _nothing_logged_yet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("EQAT_KERNELS", raising=False)
    dispatch._log_once.cache_clear()
    yield
    dispatch._log_once.cache_clear()


def call(op: str, impl: str) -> torch.Tensor:
    """Run the public function of an op on a small weight."""
    packed = random_packed_weight(2, 3, 1, 32)
    if op == "fake_quantize":
        return fake_quantize(torch.randn(3, 32), packed.scale, packed.zero_OG.float(), 2, impl=impl)
    if op == "dequantize":
        return dequantize(packed.words, packed.scale, packed.zero_words, packed.layout, impl=impl)
    assert op == "quant_linear"
    return quant_linear(torch.randn(2, 32), packed.words, packed.scale, packed.zero_words, packed.layout, impl=impl)


@pytest.mark.parametrize("op", OPS)
def test_every_op_has_the_reference(op: str) -> None:
    assert "reference" in IMPLEMENTATIONS[op]
    assert select(op, "reference", TENSOR) == "reference"
    assert select(op, "auto", TENSOR) in IMPLEMENTATIONS[op]


@pytest.mark.parametrize("op", OPS)
def test_every_implementation_runs(op: str) -> None:
    for impl in ("auto", *IMPLEMENTATIONS[op]):
        assert call(op, impl).isfinite().all()


@pytest.mark.parametrize("op", OPS)
def test_an_unknown_implementation_is_an_error(op: str) -> None:
    with pytest.raises(ValueError, match=rf"{op}: implementation 'fastest' does not exist.*auto.*reference"):
        call(op, "fastest")


@pytest.mark.parametrize("op", OPS)
def test_the_environment_decides_for_auto(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EQAT_KERNELS", "reference")
    assert select(op, "auto", TENSOR) == "reference"
    monkeypatch.setenv("EQAT_KERNELS", "fastest")
    with pytest.raises(ValueError, match="'fastest' does not exist"):
        call(op, "auto")


def test_an_argument_beats_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EQAT_KERNELS", "fastest")
    assert select("fake_quantize", "reference", TENSOR) == "reference"


def test_a_choice_is_logged_once_per_op(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger=dispatch.log.name):
        for _ in range(3):
            for op in OPS:
                select(op, "reference", TENSOR)
    assert sorted(caplog.messages) == [f"{op} on cpu: reference" for op in OPS]
