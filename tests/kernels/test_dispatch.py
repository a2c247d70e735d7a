"""The choice of an implementation: visible, overridable, and never silently another one."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from eqat_kernels import (
    IMPLEMENTATIONS,
    PackedLayout,
    cached_attention,
    compensate_columns,
    dequantize,
    dispatch,
    fake_quantize,
    narrow_linear,
    pack,
    quant_linear,
    select,
    unpack,
    use,
)
from tests.kernels.naive import random_packed_weight

OPS = sorted(IMPLEMENTATIONS)
TENSOR = torch.zeros(1)
FOLDER = Path(dispatch.__file__).parents[1]


@pytest.fixture(autouse=True)
def _nothing_logged_yet() -> Iterator[None]:
    dispatch._choose.cache_clear()
    dispatch._log_once.cache_clear()
    with use("auto"):
        yield
    dispatch._choose.cache_clear()
    dispatch._log_once.cache_clear()


def call(op: str, impl: str) -> torch.Tensor:
    """Run the public function of an op on a small weight."""
    packed = random_packed_weight(2, 3, 1, 32)
    if op == "fake_quantize":
        return fake_quantize(torch.randn(3, 32), packed.scale, packed.zero_OG.float(), 2, impl=impl)
    if op == "dequantize":
        return dequantize(packed.words, packed.scale, packed.zero_words, packed.layout, impl=impl)
    if op == "pack":
        return pack(packed.codes_OI, 2, impl=impl)
    if op == "unpack":
        return unpack(packed.words, 2, 32, impl=impl)
    if op == "columns":
        return compensate_columns(torch.randn(3, 4), torch.eye(4), torch.ones(3), torch.zeros(3), 3, impl=impl)
    if op == "cached_attention":
        rows = torch.randint(0, 64, (1, 1, 3, 18), dtype=torch.uint8)
        return cached_attention(torch.randn(1, 2, 1, 16), rows, rows, 8, impl=impl)
    if op == "narrow_linear":
        return narrow_linear(torch.randn(2, 32), torch.randn(3, 32).bfloat16(), impl=impl)
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
def test_what_auto_means_inside_a_block(op: str) -> None:
    before = select(op, "auto", TENSOR)
    with use("reference"):
        assert select(op, "auto", TENSOR) == "reference"
        with use("auto"):
            assert select(op, "auto", TENSOR) == before
        with use("fastest"), pytest.raises(ValueError, match="'fastest' does not exist"):
            call(op, "auto")
        assert select(op, "auto", TENSOR) == "reference"
    assert select(op, "auto", TENSOR) == before


def test_an_op_without_the_wanted_implementation_takes_its_reference() -> None:
    with use("cpu"):
        assert select("columns", "auto", TENSOR) == "reference"
    with pytest.raises(ValueError, match="columns: implementation 'cpu' does not exist"):
        select("columns", "cpu", TENSOR)


def test_an_argument_beats_the_block() -> None:
    with use("fastest"):
        assert select("fake_quantize", "reference", TENSOR) == "reference"


@pytest.mark.parametrize(("name", "expected"), [("reference", "reference"), ("fastest", "does not exist")])
def test_the_environment_decides_for_auto(name: str, expected: str) -> None:
    """In a process of its own: it is read at import."""
    code = "import torch, eqat_kernels; print(eqat_kernels.select('fake_quantize', 'auto', torch.zeros(1)))"
    environment = os.environ | {"EQAT_KERNELS": name}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=FOLDER, env=environment
    )
    assert (done.returncode == 0) == (name in IMPLEMENTATIONS["fake_quantize"])
    assert expected in done.stdout + done.stderr


def test_what_cannot_run_is_an_error_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    ragged = PackedLayout(bits=2, group_size=20, out_features=4, in_features=60)
    for impl in ("cpu", "triton"):
        with pytest.raises(ValueError, match=rf"'{impl}' cannot run: .*not in torch.float64"):
            select("quant_linear", impl, TENSOR.double())
        with pytest.raises(ValueError, match=rf"'{impl}' cannot run: groups must be multiples of 32"):
            select("quant_linear", impl, TENSOR, layout=ragged)
    with pytest.raises(ValueError, match=r"'cpu' cannot run: it trains float32 weights, not torch\.bfloat16"):
        select("fake_quantize", "cpu", TENSOR.bfloat16())
    with pytest.raises(ValueError, match="'cpu' cannot run: the tensor is on meta"):
        select("fake_quantize", "cpu", TENSOR.to("meta"))
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match="'triton' cannot run: the tensor is on cpu"):
        select("fake_quantize", "triton", TENSOR)


def test_auto_never_chooses_what_cannot_run() -> None:
    ragged = PackedLayout(bits=2, group_size=20, out_features=4, in_features=60)
    assert select("quant_linear", "auto", TENSOR, layout=ragged) == "reference"
    assert select("quant_linear", "auto", TENSOR.double()) == "reference"
    assert select("quant_linear", "auto", TENSOR.to("meta")) == "reference"
    assert select("quant_linear", "auto", TENSOR) != "triton"  # interpreted: for tests that ask for it


def test_everything_works_where_triton_is_missing() -> None:
    """In a process of its own, whose import system knows no Triton."""
    code = """
import sys, torch
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] == 'triton': raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Missing())
import eqat_kernels
w = torch.ones(2, 32)
assert torch.equal(eqat_kernels.fake_quantize(w, torch.ones(2, 1), torch.zeros(2, 1), 2), w)
assert 'triton' not in sys.modules
try: eqat_kernels.fake_quantize(w, torch.ones(2, 1), torch.zeros(2, 1), 2, impl='triton')
except ValueError as error: print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=FOLDER)
    assert done.returncode == 0, done.stderr
    assert "implementation 'triton' cannot run: Triton is not installed" in done.stdout


def test_a_choice_is_logged_once_per_op(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger=dispatch.log.name):
        for _ in range(3):
            for op in OPS:
                select(op, "reference", TENSOR)
    assert sorted(caplog.messages) == [f"{op} on cpu: reference" for op in OPS]


class OnDevice:
    """Stands in for a tensor on a GPU."""

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)


@pytest.fixture
def current(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Two GPUs, the first of them current; the list holds the current one, last."""
    stack = [0]

    @contextmanager
    def device(other: torch.device) -> Iterator[None]:
        stack.append(other.index)
        yield
        stack.pop()

    for name, answer in {"device_count": lambda: 2, "current_device": lambda: stack[-1], "device": device}.items():
        monkeypatch.setattr(torch.cuda, name, answer)
    dispatch.implementation.cache_clear()
    return stack


@pytest.fixture(autouse=True)
def _no_implementation_of_another_test() -> Iterator[None]:
    yield
    dispatch.implementation.cache_clear()


@pytest.mark.parametrize(("device", "expected"), [("cuda:1", 1), ("cuda:0", 0), ("cpu", 0)])
def test_a_kernel_is_launched_on_the_gpu_of_its_tensor(
    current: list[int], monkeypatch: pytest.MonkeyPatch, device: str, expected: int
) -> None:
    calls: list[tuple[int, Any]] = []
    module = SimpleNamespace(forward=lambda *args, **kwargs: calls.append((current[-1], (args, kwargs))), TILE=64)
    monkeypatch.setattr(dispatch.importlib, "import_module", lambda name: module)
    chosen, tensor = dispatch.implementation("quant_linear", "triton"), OnDevice(device)
    for _ in range(2):
        chosen.forward(tensor, 7, wanted=True)
    assert calls == [(expected, ((tensor, 7), {"wanted": True}))] * 2
    assert current == [0]
    assert chosen.TILE == 64


def test_one_gpu_needs_no_guard(current: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert isinstance(dispatch.implementation("unpack", "triton"), ModuleType)
    assert isinstance(dispatch.implementation("unpack", "cpu"), ModuleType)
