"""The packed linear layer against a dense one in float64, forward and backward."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from eqat_kernels import cpu_library, quant_linear
from tests.kernels.naive import PackedWeight, random_packed_weight
from tests.tolerances import assert_close

BITS = (2, 3, 4, 8)
LEADING = [(5,), (2, 3), (2, 3, 1)]
"""Leading dimensions of x."""


def call(x: Tensor, packed: PackedWeight, bias: Tensor | None = None) -> Tensor:
    return quant_linear(x, packed.words, packed.scale, packed.zero_words, packed.layout, bias)


def expected_results(x: Tensor, packed: PackedWeight, bias: Tensor | None, grad_y: Tensor) -> dict[str, Tensor]:
    """Compute y and the gradients of x, scale and bias with a dense float64 weight."""
    leaves = {"x": x.detach().double(), "scale": packed.scale.detach().double()}
    if bias is not None:
        leaves["bias"] = bias.detach().double()
    for leaf in leaves.values():
        leaf.requires_grad_()
    dense = PackedWeight(**{**vars(packed), "scale": leaves["scale"]}).dense()
    y = torch.nn.functional.linear(leaves["x"], dense, leaves.get("bias"))
    gradients = torch.autograd.grad(y, list(leaves.values()), grad_y.double())
    return {"y": y, **dict(zip(leaves, gradients, strict=True))}


def check(x: Tensor, packed: PackedWeight, bias: Tensor | None, autocast: torch.dtype | None = None) -> Tensor:
    """Run forward and backward, compare everything, and return y."""
    for leaf in (x, packed.scale, bias):
        if leaf is not None:
            leaf.requires_grad_()
    context: AbstractContextManager[object] = nullcontext() if autocast is None else torch.autocast("cpu", autocast)
    with context:
        y = call(x, packed, bias)
    grad_y = torch.randn_like(y)
    y.backward(grad_y)
    expected = expected_results(x, packed, bias, grad_y)
    computed_in = autocast or x.dtype
    assert_close(y, expected["y"], "matmul", computed_in)
    for name, leaf in {"x": x, "scale": packed.scale, "bias": bias}.items():
        if leaf is None:
            continue
        assert leaf.grad is not None
        assert leaf.grad.dtype is leaf.dtype
        assert_close(leaf.grad, expected[name], "gradient", computed_in)
    return y


@pytest.mark.parametrize("symmetric", [False, True], ids=["asymmetric", "symmetric"])
@pytest.mark.parametrize("leading", LEADING, ids=str)
@pytest.mark.parametrize("bits", BITS)
def test_forward_and_gradients_are_the_dense_ones(bits: int, leading: tuple[int, ...], symmetric: bool) -> None:
    packed = random_packed_weight(bits, 9, 3, 32, symmetric=symmetric)
    y = check(torch.randn(*leading, 96), packed, torch.randn(9))
    assert y.shape == (*leading, 9)
    assert y.dtype is torch.float32


@pytest.mark.parametrize("shape", [(1, 1, 32), (10, 1, 17), (7, 5, 3)], ids=str)
def test_odd_shapes_without_bias(shape: tuple[int, int, int]) -> None:
    packed = random_packed_weight(3, *shape)
    check(torch.randn(4, packed.layout.in_features), packed, None)


@pytest.mark.parametrize("symmetric", [False, True], ids=["asymmetric", "symmetric"])
@pytest.mark.parametrize("leading", LEADING, ids=str)
@pytest.mark.parametrize("bits", BITS)
def test_autocast_computes_in_bfloat16(bits: int, leading: tuple[int, ...], symmetric: bool) -> None:
    packed = random_packed_weight(bits, 9, 3, 32, symmetric=symmetric)
    y = check(torch.randn(*leading, 96), packed, torch.randn(9), torch.bfloat16)
    assert y.dtype is torch.bfloat16
    assert y.shape == (*leading, 9)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_the_output_has_the_dtype_of_x(dtype: torch.dtype) -> None:
    packed = random_packed_weight(2, 9, 3, 32)
    packed.scale = packed.scale.to(dtype)
    assert check(torch.randn(5, 96).to(dtype), packed, torch.randn(9).to(dtype)).dtype is dtype


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_float32_scale_and_bias_follow_x(dtype: torch.dtype) -> None:
    packed = random_packed_weight(2, 9, 3, 32)
    assert check(torch.randn(5, 96).to(dtype), packed, torch.randn(9)).dtype is dtype


def test_a_single_vector_is_a_row() -> None:
    packed = random_packed_weight(2, 9, 3, 32)
    assert check(torch.randn(96), packed, None).shape == (9,)


def test_no_tokens_give_no_gradient() -> None:
    packed = random_packed_weight(2, 9, 3, 32)
    packed.scale.requires_grad_()
    call(torch.zeros(0, 96), packed).sum().backward()
    assert packed.scale.grad is not None
    assert not packed.scale.grad.any()


@pytest.mark.parametrize("symmetric", [False, True], ids=["asymmetric", "symmetric"])
def test_finite_differences_agree(symmetric: bool) -> None:
    """At fixed codes the layer is linear in x, in s and in the bias, so its gradients are true derivatives."""
    packed = random_packed_weight(3, 4, 2, 5, symmetric=symmetric)
    scale = packed.scale.double().requires_grad_()
    x = torch.randn(3, 10, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(4, dtype=torch.float64, requires_grad=True)

    def run(x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        return quant_linear(x, packed.words, scale, packed.zero_words, packed.layout, bias)

    assert torch.autograd.gradcheck(run, (x, scale, bias))


@pytest.mark.parametrize("wanted", ["x", "scale"])
def test_only_the_gradient_asked_for_is_computed(wanted: str) -> None:
    packed = random_packed_weight(2, 9, 3, 32)
    x = torch.randn(5, 96, requires_grad=wanted == "x")
    packed.scale.requires_grad_(wanted == "scale")
    call(x, packed).sum().backward()
    assert (x.grad is not None) == (wanted == "x")
    assert (packed.scale.grad is not None) == (wanted == "scale")


@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=["float32", "autocast"])
@pytest.mark.parametrize("symmetric", [False, True], ids=["asymmetric", "symmetric"])
def test_only_x_and_the_packed_tensors_are_kept(symmetric: bool, autocast: torch.dtype | None) -> None:
    packed = random_packed_weight(3, 20, 3, 32, symmetric=symmetric)
    packed.scale.requires_grad_()
    x, bias = torch.randn(2, 96, requires_grad=True), torch.randn(20, requires_grad=True)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    context: AbstractContextManager[object] = nullcontext() if autocast is None else torch.autocast("cpu", autocast)
    with saved_tensors_hooks(keep, lambda tensor: tensor), context:
        y = call(x, packed, bias)
    grid = {t.data_ptr() for t in (packed.words, packed.scale, packed.zero_words) if t is not None}
    others = [tensor for tensor in kept if tensor.data_ptr() not in grid]
    assert grid <= {tensor.data_ptr() for tensor in kept}
    assert [tensor.shape for tensor in others] == [x.shape]
    assert others[0].dtype is (autocast or torch.float32)
    assert autocast is not None or others[0].data_ptr() == x.data_ptr()
    y.sum().backward()


def test_the_integers_are_left_alone() -> None:
    packed = random_packed_weight(3, 9, 3, 32)
    assert packed.zero_words is not None
    before = [tensor.clone() for tensor in (packed.words, packed.scale, packed.zero_words)]
    check(torch.randn(5, 96), packed, None)
    for tensor, copy in zip((packed.words, packed.scale, packed.zero_words), before, strict=True):
        assert torch.equal(tensor, copy)


@pytest.mark.skipif(cpu_library.obstacle() is not None, reason=str(cpu_library.obstacle()))
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_one_row_of_any_size_of_numbers(bits: int, symmetric: bool) -> None:
    """On a CPU it may be computed in whole numbers: what is largest, tiny, far apart, of one sign or not finite."""
    for groups, size in ((3, 64), (2, 128), (1, 576), (5, 32)):
        packed = random_packed_weight(bits, 9, groups, size, symmetric=symmetric)
        x = torch.randn(1, groups * size)
        far = x.clone()
        far[0, 5], far[0, -1] = 3000.0, -1e4
        for given in (x, x.abs(), far, x * 1e-33, x * 1e31, torch.zeros_like(x), torch.full_like(x, -7.7)):
            y = quant_linear(given, packed.words, packed.scale, packed.zero_words, packed.layout, impl="cpu")
            assert_close(y, given.double() @ packed.dense().T, "matmul")
        for bad in (float("nan"), float("inf")):
            y = quant_linear(x.fill_(bad), packed.words, packed.scale, packed.zero_words, packed.layout, impl="cpu")
            assert not y.isfinite().any()
