"""One sweep for every implementation: each op forward and backward against the reference in float64.

Inputs lie inside larger buffers full of NaN, so reading past an edge shows; outputs are allocated inside buffers full
of NaN, so an element that is not written shows, and a write past an edge, too.

Shape letters: O output rows, I inputs, G groups, g group size, T tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import product
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from eqat_kernels import dequantize, fake_quant_linear, fake_quantize, pack, quant_linear, unpack
from tests.kernels.naive import PackedWeight, per_weight, random_codes, random_packed_weight
from tests.tolerances import assert_close

BITS = (2, 3, 4, 8)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SHAPES = (
    (1, 4, 32, 1),
    (9, 3, 32, 5),
    (10, 1, 17, 4),
    (21, 2, 64, 16),
    (35, 1, 100, 17),
    (70, 5, 32, 66),
    (5, 2, 128, 3),
    (131, 3, 64, 130),
    (66, 1, 515, 2),
    (3, 2, 256, 129),
)
"""(O, G, g, T): a single row and token, rows that end inside a word, a tile and a group, several tiles each way."""

GUARD = 64
"""Elements of poison on either side of an output."""


@dataclass(frozen=True)
class Case:
    """One point of the sweep."""

    bits: int
    symmetric: bool
    shape: tuple[int, int, int, int]
    dtype: torch.dtype

    def __str__(self) -> str:
        symmetry = "symmetric" if self.symmetric else "asymmetric"
        return f"{self.bits}-{symmetry}-{'x'.join(map(str, self.shape))}-{str(self.dtype).removeprefix('torch.')}"


def full_sweep() -> list[Case]:
    """Every combination."""
    return [Case(*point) for point in product(BITS, (False, True), SHAPES, DTYPES)]


def short_sweep() -> list[Case]:
    """Every pair of shape and bits, every pair of bits, symmetry and dtype; some of the triples."""
    return [
        Case(bits, (row + column) % 2 == 1, shape, DTYPES[(row + 2 * column) % 3])
        for row, shape in enumerate(SHAPES)
        for column, bits in enumerate(BITS)
    ]


# ---- buffers full of poison ------------------------------------------------------------------------


def poison_of(dtype: torch.dtype) -> float:
    """NaN; for integers a value that stands out."""
    return math.nan if dtype.is_floating_point else 0x5A


def inside_poison(tensor: Tensor, *, transposed: bool = False) -> Tensor:
    """Return a view of the values of a matrix with poison around every row; rows are columns where `transposed`."""
    source = tensor.T if transposed else tensor
    rows, columns = source.shape
    buffer = torch.full((rows + 2, columns + 3), poison_of(tensor.dtype), dtype=tensor.dtype, device=tensor.device)
    view = buffer[1:-1, 2:-1]
    view.copy_(source)
    return view.T if transposed else view


@contextmanager
def poisoned_outputs() -> Iterator[None]:
    """Allocate with poison inside and around; at the end no poison is left inside, and all of it around."""
    buffers: list[Tensor] = []
    empty_like = torch.empty_like

    def empty(*shape: Any, dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
        size = shape[0] if isinstance(shape[0], tuple) else shape
        return allocate(math.prod(size), dtype, device).view(size)

    def like(tensor: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
        return allocate(tensor.numel(), dtype or tensor.dtype, tensor.device).as_strided(
            tensor.shape, empty_like(tensor).stride(), GUARD
        )

    def allocate(count: int, dtype: torch.dtype, device: torch.device | str) -> Tensor:
        buffer = torch.full((count + 2 * GUARD,), poison_of(dtype), dtype=dtype, device=device)
        buffers.append(buffer)
        return buffer[GUARD : GUARD + count]

    with mock.patch("torch.empty", empty), mock.patch("torch.empty_like", like):
        yield
    assert buffers, "nothing was allocated"
    for buffer in buffers:
        around = torch.cat([buffer[:GUARD], buffer[-GUARD:]])
        if buffer.is_floating_point():
            assert around.isnan().all(), "written outside"
            assert not buffer[GUARD:-GUARD].isnan().any(), "not written"
        else:
            assert (around == 0x5A).all(), "written outside"


# ---- the ops ---------------------------------------------------------------------------------------


def packed_of(case: Case, device: str) -> PackedWeight:
    """Draw a packed weight on a device."""
    rows, groups, group, _ = case.shape
    packed = random_packed_weight(case.bits, rows, groups, group, symmetric=case.symmetric)
    tensors = {name: value.to(device) for name, value in vars(packed).items() if isinstance(value, Tensor)}
    return replace(packed, **tensors)


def check_packing(case: Case, impl: str, device: str) -> None:
    """Pack and unpack, rows and columns."""
    rows, groups, group, _ = case.shape
    for transposed in (False, True):
        codes = inside_poison(random_codes(rows, groups * group, bits=case.bits).to(device), transposed=transposed)
        with poisoned_outputs():
            words = pack(codes, case.bits, impl=impl)
        assert torch.equal(words, pack(codes, case.bits, impl="reference"))
        with poisoned_outputs():
            assert torch.equal(unpack(inside_poison(words), case.bits, codes.shape[1], impl=impl), codes)


def check_dequantize(case: Case, impl: str, device: str) -> None:
    """Packed codes to a dense weight."""
    packed = packed_of(case, device)
    with poisoned_outputs():
        weight = dequantize(packed.words, packed.scale, packed.zero_words, packed.layout, case.dtype, impl=impl)
    assert weight.dtype is case.dtype
    assert_close(weight, packed.dense(), "elementwise")


def fake_quantize_problem(case: Case, device: str) -> list[Tensor]:
    """Draw W, s, z and a gradient; weights lie inside and on both sides of the range, and not on a rounding edge."""
    rows, groups, group, _ = case.shape
    top = (1 << case.bits) - 1
    s_OG = (torch.rand(rows, groups) + 0.1) / top
    z_OG = torch.rand(rows, groups) * top
    if case.symmetric:
        s_OG *= torch.randn(rows, groups).sign()
        z_OG = torch.full_like(z_OG, 1 << (case.bits - 1))
    codes_OI = (torch.rand(rows, groups * group) * 2 - 0.5) * top - per_weight(z_OG, groups * group)
    w_OI = (codes_OI.round() + 0.8 * (torch.rand_like(codes_OI) - 0.5)) * per_weight(s_OG, groups * group)
    grad_OI = torch.randn_like(w_OI)
    tensors = [w_OI.to(case.dtype), s_OG, z_OG, grad_OI.to(case.dtype)]
    return [tensor.to(device) for tensor in tensors]


def check_fake_quantize(case: Case, impl: str, device: str) -> None:
    """W_hat, dW, ds and dz, with W, s and z of any strides and a gradient of others."""
    w_OI, s_OG, z_OG, grad_OI = fake_quantize_problem(case, device)
    exact = [tensor.double().requires_grad_() for tensor in (w_OI, s_OG, z_OG)]
    expected = fake_quantize(*exact, case.bits, impl="reference")  # type: ignore[misc]
    gradients = torch.autograd.grad(expected, exact, grad_OI.double())

    given = [inside_poison(tensor).requires_grad_() for tensor in (w_OI, s_OG, z_OG)]
    with poisoned_outputs():
        found = fake_quantize(*given, case.bits, impl=impl)  # type: ignore[misc]
        found_gradients = torch.autograd.grad(found, given, inside_poison(grad_OI, transposed=True))
    assert_close(found, expected, "elementwise")
    assert torch.equal(found_gradients[0].double(), gradients[0])
    for value, wanted in zip(found_gradients[1:], gradients[1:], strict=True):
        assert value.dtype is torch.float32
        assert_close(value, wanted, "gradient")


def check_fake_quantize_for_a_product(case: Case, impl: str, device: str) -> None:
    """W in float32, W_hat and its gradient in the dtype of the matrix product, as under autocast."""
    w_OI, s_OG, z_OG, grad_OI = fake_quantize_problem(replace(case, dtype=torch.float32), device)
    exact = [tensor.double().requires_grad_() for tensor in (w_OI, s_OG, z_OG)]
    expected = fake_quantize(*exact, case.bits, impl="reference")  # type: ignore[misc]
    gradients = torch.autograd.grad(expected, exact, grad_OI.to(case.dtype).double())

    given = [inside_poison(tensor).requires_grad_() for tensor in (w_OI, s_OG, z_OG)]
    with poisoned_outputs():
        found = fake_quantize(*given, case.bits, dtype=case.dtype, impl=impl)  # type: ignore[misc]
        found_gradients = torch.autograd.grad(found, given, inside_poison(grad_OI.to(case.dtype)))
    assert found.dtype is case.dtype
    assert_close(found, expected, "elementwise")
    assert torch.equal(found_gradients[0].double(), gradients[0])
    for value, wanted in zip(found_gradients[1:], gradients[1:], strict=True):
        assert value.dtype is torch.float32
        assert_close(value, wanted, "gradient")


def usual_size(x_TI: Tensor, w_OI: Tensor) -> float:
    """Return the size of an output where it does not cancel, as a single one may: that of a sum of random signs."""
    longest = x_TI.detach().double().norm(dim=1).max() * w_OI.detach().double().norm(dim=1).max()
    return longest.item() / x_TI.shape[1] ** 0.5


def check_fake_quant_linear(case: Case, impl: str, device: str) -> None:
    """Output, and the gradients of x, W, s, z and the bias; W in float32, x in the dtype of the product."""
    w_OI, s_OG, z_OG, _ = fake_quantize_problem(replace(case, dtype=torch.float32), device)
    x_TI = torch.randn(case.shape[3], w_OI.shape[1]).to(device, case.dtype)
    bias = torch.randn(w_OI.shape[0]).to(device)
    grad_TO = torch.randn(case.shape[3], w_OI.shape[0]).to(device, case.dtype)

    exact = [tensor.double().requires_grad_() for tensor in (x_TI, w_OI, s_OG, z_OG, bias)]
    weight = fake_quantize(*exact[1:4], case.bits, impl="reference")  # type: ignore[misc]
    expected = torch.nn.functional.linear(exact[0], weight, exact[4])
    gradients = torch.autograd.grad(expected, exact, grad_TO.double())

    given = [inside_poison(tensor).requires_grad_() for tensor in (x_TI, w_OI, s_OG, z_OG)]
    given.append(bias.clone().requires_grad_())
    with poisoned_outputs():
        found = fake_quant_linear(*given[:4], case.bits, given[4], impl=impl)  # type: ignore[misc]
        found_gradients = torch.autograd.grad(found, given, inside_poison(grad_TO))
    assert found.dtype is case.dtype
    assert_close(found, expected, "matmul", least=usual_size(exact[0], weight))
    for value, wanted in zip(found_gradients, gradients, strict=True):
        assert_close(value, wanted, "gradient", case.dtype)


def check_quant_linear(case: Case, impl: str, device: str) -> None:
    """Output, and the gradients of x, s and the bias, with x and the gradient of any strides."""
    packed = packed_of(case, device)
    x_TI = torch.randn(case.shape[3], packed.layout.in_features).to(device, case.dtype)
    bias = torch.randn(packed.layout.out_features).to(device)
    grad_TO = torch.randn(case.shape[3], packed.layout.out_features).to(device, case.dtype)
    integers = packed.words, packed.zero_words, packed.layout

    def run(x: Tensor, scale: Tensor, bias: Tensor, grad: Tensor, impl: str) -> tuple[Tensor, tuple[Tensor, ...]]:
        leaves = [tensor.requires_grad_() for tensor in (x, scale, bias)]
        words, zero_words, layout = integers
        y = quant_linear(x, words, scale, zero_words, layout, bias, impl=impl)
        return y, torch.autograd.grad(y, leaves, grad)

    exact = run(x_TI.double(), packed.scale.double(), bias.double(), grad_TO.double(), "reference")
    given = inside_poison(x_TI, transposed=case.bits == 3)
    with poisoned_outputs():
        y, gradients = run(given, packed.scale.clone(), bias, inside_poison(grad_TO), impl)
    assert y.dtype is case.dtype
    assert_close(y, exact[0], "matmul", least=usual_size(x_TI, packed.dense()))
    for value, wanted in zip(gradients, exact[1], strict=True):
        assert_close(value, wanted, "gradient", case.dtype)


CHECKS = {
    "packing": check_packing,
    "dequantize": check_dequantize,
    "fake_quantize": check_fake_quantize,
    "fake_quantize for a product": check_fake_quantize_for_a_product,
    "fake_quant_linear": check_fake_quant_linear,
    "quant_linear": check_quant_linear,
}
