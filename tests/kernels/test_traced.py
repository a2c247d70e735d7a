"""torch.compile in one graph: the registered ops, values and gradients as without it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from eqat_kernels import dequantize, fake_quant_linear, fake_quantize, quant_linear, use
from eqat_kernels.dequant import traced as traced_dequant
from eqat_kernels.fake_quant import traced as traced_fake
from eqat_kernels.quant_linear import traced as traced_linear
from tests.kernels.naive import PackedWeight, random_packed_weight
from tests.tolerances import assert_close

BITS = (2, 3, 4, 8)
CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


def in_one_graph(function: Callable[..., Any]) -> Callable[..., Any]:
    torch.compiler.reset()
    return torch.compile(function, fullgraph=True, backend="aot_eager")


def leaves_of(packed: PackedWeight, dtype: torch.dtype, rows: int, *, bias: bool) -> list[Tensor]:
    layout = packed.layout
    given = [torch.randn(2, rows, layout.in_features).to(dtype), packed.scale.clone()]
    given += [torch.randn(layout.out_features)] if bias else []
    return [tensor.requires_grad_() for tensor in given]


def linear_of(packed: PackedWeight, impl: str = "auto") -> Callable[..., Tensor]:
    def run(x: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
        return quant_linear(x, packed.words, scale, packed.zero_words, packed.layout, bias, impl=impl)

    return run


def outcome(run: Callable[..., Tensor], leaves: list[Tensor]) -> tuple[Tensor, ...]:
    y = run(*leaves)
    torch.manual_seed(3)
    return y, *torch.autograd.grad(y, leaves, torch.randn_like(y))


def assert_same(run: Callable[..., Tensor], leaves: list[Tensor]) -> None:
    found, wanted = outcome(in_one_graph(run), leaves), outcome(run, leaves)
    for value, expected in zip(found, wanted, strict=True):
        assert value.dtype is expected.dtype
        assert torch.equal(value, expected)


INTERPRETED = ("triton", torch.bfloat16)
"""Takes ten seconds at any width, so one is tried by default."""

WAYS = [
    pytest.param(bits, dtype, impl, marks=pytest.mark.slow if (impl, dtype) == INTERPRETED and bits != 3 else ())
    for bits in BITS
    for dtype in (torch.float32, torch.bfloat16)
    for impl in ("cpu", "reference", "triton")
]


@pytest.mark.parametrize(("bits", "dtype", "impl"), WAYS, ids=str)
def test_a_linear_is_one_op(bits: int, dtype: torch.dtype, impl: str) -> None:
    packed = random_packed_weight(bits, 9, 3, 32, symmetric=bits == 4)
    assert_same(linear_of(packed, impl), leaves_of(packed, dtype, 3, bias=bits != 3))


def test_many_rows_and_one_number_of_rows_more() -> None:
    packed = random_packed_weight(2, 9, 3, 32)
    run = in_one_graph(linear_of(packed))
    for rows in (1, 20, 21):
        leaves = leaves_of(packed, torch.float32, rows, bias=True)
        assert all(map(torch.equal, outcome(run, leaves), outcome(linear_of(packed), leaves)))


@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_gradients_that_nobody_wants_are_none(frozen: int) -> None:
    packed = random_packed_weight(2, 9, 3, 32)
    leaves = leaves_of(packed, torch.float32, 3, bias=True)
    leaves[frozen].requires_grad_(False)
    in_one_graph(linear_of(packed))(*leaves).sum().backward()
    assert [leaf.grad is None for leaf in leaves] == [place == frozen for place in range(3)]


@pytest.mark.parametrize("enabled", [True, False])
def test_autocast_decides_before_the_op(enabled: bool) -> None:
    packed = random_packed_weight(2, 9, 3, 32)

    def run(*leaves: Tensor) -> Tensor:
        context: AbstractContextManager[Any] = torch.autocast("cpu", torch.bfloat16) if enabled else nullcontext()
        with context:
            return linear_of(packed)(*leaves)

    leaves = leaves_of(packed, torch.float32, 3, bias=True)
    assert run(*leaves).dtype is (torch.bfloat16 if enabled else torch.float32)
    assert_same(run, leaves)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dequantize_is_one_op(dtype: torch.dtype, symmetric: bool) -> None:
    packed = random_packed_weight(3, 9, 3, 32, symmetric=symmetric)

    def run(scale: Tensor) -> Tensor:
        return dequantize(packed.words, scale, packed.zero_words, packed.layout, dtype)

    assert torch.equal(in_one_graph(run)(packed.scale), run(packed.scale))


def test_what_auto_means_is_asked_when_the_op_runs() -> None:
    packed = random_packed_weight(2, 9, 3, 32)
    x, run = torch.randn(1, 4, 96), in_one_graph(linear_of(packed))
    run(x, packed.scale)
    with use("fastest"), pytest.raises(ValueError, match="'fastest' does not exist"):
        run(x, packed.scale)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch 2.14's own, in opcheck
@pytest.mark.parametrize("bias", [True, False])
def test_the_linear_is_registered_as_torch_wants_it(bias: bool) -> None:
    packed = random_packed_weight(2, 9, 3, 32, symmetric=bias)
    x, scale, *rest = leaves_of(packed, torch.float32, 3, bias=bias)
    given = (x[0].detach().requires_grad_(), packed.words, scale, packed.zero_words, rest[0] if rest else None)
    torch.library.opcheck(traced_linear.quant_linear, (*given, *packed.layout.numbers, "cpu"), test_utils=CHECKS)


@pytest.mark.parametrize("wanted", [(True, True), (False, True), (True, False)])
def test_its_backward_is_registered_as_torch_wants_it(wanted: tuple[bool, bool]) -> None:
    packed = random_packed_weight(2, 9, 3, 32)
    given = (torch.randn(4, 9), torch.randn(4, 96), packed.words, packed.scale, packed.zero_words)
    for impl in ("cpu", "reference"):
        arguments = (*given, *packed.layout.numbers, impl, *wanted)
        torch.library.opcheck(traced_linear.quant_linear_backward, arguments, test_utils=CHECKS)


def test_dequantize_is_registered_as_torch_wants_it() -> None:
    packed = random_packed_weight(2, 9, 3, 32)
    given = (packed.words, packed.scale, packed.zero_words, torch.bfloat16, *packed.layout.numbers, "cpu")
    torch.library.opcheck(traced_dequant.dequantize, given, test_utils=CHECKS)


def trained_weight() -> list[Tensor]:
    given = [torch.randn(9, 96), torch.rand(9, 3) + 0.2, torch.rand(9, 3) * 3]
    return [tensor.requires_grad_() for tensor in given]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fake_quantize_is_one_op(dtype: torch.dtype) -> None:
    def run(weight: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        return fake_quantize(weight, scale, zero_point, 2, dtype=dtype)

    assert_same(run, trained_weight())


@pytest.mark.parametrize("autocast", [True, False])
def test_a_trained_linear_is_in_the_graph(autocast: bool) -> None:
    def run(x: Tensor, weight: Tensor, scale: Tensor, zero_point: Tensor, bias: Tensor) -> Tensor:
        context: AbstractContextManager[Any] = torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext()
        with context:
            return fake_quant_linear(x, weight, scale, zero_point, 2, bias)

    leaves = [torch.randn(2, 5, 96).requires_grad_(), *trained_weight(), torch.randn(9).requires_grad_()]
    found, wanted = outcome(in_one_graph(run), leaves), outcome(run, leaves)
    for value, expected in zip(found, wanted, strict=True):
        assert value.dtype is expected.dtype
        assert_close(value, expected, "gradient", torch.bfloat16 if autocast else torch.float32)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch 2.14's own, in opcheck
def test_fake_quantize_is_registered_as_torch_wants_it() -> None:
    for impl in ("cpu", "reference"):
        arguments = (*trained_weight(), 2, torch.float32, impl)
        torch.library.opcheck(traced_fake.fake_quantize, arguments, test_utils=CHECKS)
        detached = [tensor.detach() for tensor in trained_weight()]
        arguments = (torch.randn(9, 96), *detached, 2, impl)
        torch.library.opcheck(traced_fake.fake_quantize_backward, arguments, test_utils=CHECKS)
