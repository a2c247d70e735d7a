"""The compiled CPU kernels against the reference in float64, and the compilation itself."""

from __future__ import annotations

import logging
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from eqat_kernels import cpu_library, dispatch, fake_quantize, quant_linear, select, use
from eqat_kernels.fake_quant import cpu_impl, reference
from tests.kernels.naive import random_packed_weight
from tests.kernels.sweep import CHECKS, Case, full_sweep, short_sweep
from tests.tolerances import assert_close

needs_compiler = pytest.mark.skipif(cpu_library.obstacle() is not None, reason=str(cpu_library.obstacle()))


@pytest.fixture
def _compile_again() -> Iterator[None]:
    def forget() -> None:
        cpu_library._load.cache_clear()
        dispatch._choose.cache_clear()

    forget()
    yield
    forget()


@needs_compiler
@pytest.mark.parametrize(
    "sweep", [short_sweep, pytest.param(full_sweep, marks=pytest.mark.slow)], ids=["short", "full"]
)
@pytest.mark.parametrize("op", CHECKS)
def test_the_sweep(op: str, sweep: Callable[[], list[Case]]) -> None:
    for case in sweep():
        if op != "fake_quantize" or case.dtype is torch.float32:
            CHECKS[op](case, "cpu", "cpu")


@needs_compiler
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_training_sees_the_codes_of_the_reference_bit_by_bit(bits: int) -> None:
    """Division goes through an inverse; that must not move a single weight to another code."""
    w_OI = torch.randn(256, 4096) * 10.0 ** torch.randint(-6, 3, (256, 1))
    s_OG = (torch.rand(256, 64) + 0.01) * 10.0 ** torch.randint(-6, 1, (256, 1))
    z_OG = torch.rand(256, 64) * ((1 << bits) - 1)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        weight = cpu_impl.forward(w_OI, s_OG, z_OG, bits, dtype)
        assert torch.equal(weight, reference.forward(w_OI, s_OG, z_OG, bits, dtype))
        grad_OI = torch.randn_like(weight)
        grad_w_OI, wanted_OI = torch.empty_like(w_OI), torch.empty_like(w_OI)
        grad_s, grad_z, again = cpu_impl.backward(grad_OI, w_OI, s_OG, z_OG, bits, grad_w_OI, remake=True)
        wanted_s, wanted_z, _ = reference.backward(grad_OI, w_OI, s_OG, z_OG, bits, wanted_OI, remake=False)
        assert torch.equal(grad_w_OI, wanted_OI)
        assert again is not None
        assert torch.equal(again, weight)
        assert_close(grad_s, wanted_s, "gradient")
        assert_close(grad_z, wanted_z, "gradient")


@needs_compiler
@pytest.mark.parametrize("rows", range(1, 19))
def test_every_number_of_rows(rows: int) -> None:
    """One, four, eight and sixteen rows have code of their own; others are padded, and more are a dense product."""
    packed = random_packed_weight(3, 19, 3, 32)
    x = torch.randn(rows, 96)
    y = quant_linear(x, packed.words, packed.scale, packed.zero_words, packed.layout, impl="cpu")
    assert_close(y, x.double() @ packed.dense().T, "matmul")


@needs_compiler
def test_the_number_of_threads_does_not_change_a_bit() -> None:
    w_OI, s_OG, z_OG = torch.randn(37, 192), torch.rand(37, 3) + 0.1, torch.rand(37, 3) * 3
    packed, x = random_packed_weight(2, 37, 3, 64), torch.randn(2, 192)
    results = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        try:
            y = quant_linear(x, packed.words, packed.scale, packed.zero_words, packed.layout, impl="cpu")
            results.append((y, fake_quantize(w_OI, s_OG, z_OG, 2, impl="cpu")))
        finally:
            torch.set_num_threads(1)
    assert all(torch.equal(left, right) for left, right in zip(*results, strict=True))


@needs_compiler
@pytest.mark.usefixtures("_compile_again")
def test_the_library_is_compiled_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("EQAT_CACHE", str(tmp_path))
    assert cpu_library.obstacle() is None
    (library,) = (tmp_path / "kernels").iterdir()
    made = library.stat().st_mtime_ns
    cpu_library._load.cache_clear()
    assert cpu_library.obstacle() is None
    assert [library.stat().st_mtime_ns] == [path.stat().st_mtime_ns for path in (tmp_path / "kernels").iterdir()]
    assert library.stat().st_mtime_ns == made


@pytest.mark.usefixtures("_compile_again")
def test_without_a_compiler_auto_is_the_reference(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(cpu_library.shutil, "which", lambda _: None)
    with use("auto"), caplog.at_level(logging.WARNING, logger=cpu_library.log.name):
        assert select("fake_quantize", "auto", torch.zeros(1)) == "reference"
        assert select("quant_linear", "auto", torch.zeros(1)) == "reference"
    assert [message for message in caplog.messages if "no C compiler" in message] == caplog.messages
    assert len(caplog.messages) == 1
    with pytest.raises(ValueError, match="'cpu' cannot run: there is no C compiler"):
        select("fake_quantize", "cpu", torch.zeros(1))


@pytest.mark.usefixtures("_compile_again")
def test_a_failing_compiler_is_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        if "--version" in command:
            return subprocess.CompletedProcess(command, 0, "none 1.0", "")
        raise subprocess.CalledProcessError(1, command, stderr="unrecognized option")

    monkeypatch.setenv("EQAT_CACHE", str(tmp_path))
    monkeypatch.setenv("CC", "some-cc")
    monkeypatch.setattr(cpu_library.subprocess, "run", fail)
    assert f"some-cc could not compile {cpu_library.FOLDER}: unrecognized option" in str(cpu_library.obstacle())
