"""Fake quantization against eqs. 1 and 2 and the table of derivatives, element by element in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from eqat_kernels import fake_quant_linear, fake_quantize
from eqat_kernels.fake_quant import reference
from tests.kernels.naive import fake_quantize_elements, per_group, per_weight
from tests.tolerances import assert_close

BITS = (2, 3, 4, 8)
SHAPES = [(1, 1, 32), (3, 5, 7), (7, 1, 13), (5, 3, 64)]
"""(O, G, g); one group per row is `group_size: -1`."""

Problem = tuple[Tensor, Tensor, Tensor]


def problem(bits: int, shape: tuple[int, int, int], *, symmetric: bool = False) -> Problem:
    """Draw W, s, z so that weights lie inside and on both sides of the range; z is not an integer unless symmetric."""
    rows, groups, group = shape
    top = (1 << bits) - 1
    s_OG = (torch.rand(rows, groups, dtype=torch.float64) + 0.1) / top
    z_OG = torch.rand(rows, groups, dtype=torch.float64) * top
    if symmetric:
        s_OG *= torch.randn(rows, groups).sign()
        z_OG = torch.full_like(z_OG, 1 << (bits - 1))
    codes_OI = (torch.rand(rows, groups * group, dtype=torch.float64) * 2 - 0.5) * top
    w_OI = (codes_OI - per_weight(z_OG, groups * group)) * per_weight(s_OG, groups * group)
    return w_OI.requires_grad_(), s_OG.requires_grad_(), z_OG.requires_grad_()


@pytest.mark.parametrize("symmetric", [False, True], ids=["asymmetric", "symmetric"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("bits", BITS)
def test_forward_and_gradients_are_the_naive_ones(bits: int, shape: tuple[int, int, int], symmetric: bool) -> None:
    w_OI, s_OG, z_OG = problem(bits, shape, symmetric=symmetric)
    naive = fake_quantize_elements(w_OI, s_OG, z_OG, bits)
    value = fake_quantize(w_OI, s_OG, z_OG, bits)
    assert_close(value, naive["value"], "elementwise")

    grad_OI = torch.randn_like(w_OI)
    value.backward(grad_OI)
    assert w_OI.grad is not None
    assert s_OG.grad is not None
    assert torch.equal(w_OI.grad, grad_OI * naive["by_weight"])
    assert_close(s_OG.grad, per_group(grad_OI * naive["by_scale"], shape[1]), "gradient")
    assert z_OG.grad is not None
    assert_close(z_OG.grad, per_group(grad_OI * naive["by_zero"], shape[1]), "gradient")


@pytest.mark.parametrize("symmetric", [False, True], ids=["asymmetric", "symmetric"])
@pytest.mark.parametrize("bits", BITS)
def test_the_problems_reach_every_row_of_the_table(bits: int, symmetric: bool) -> None:
    w_OI, s_OG, z_OG = problem(bits, (5, 3, 64), symmetric=symmetric)
    naive = fake_quantize_elements(w_OI, s_OG, z_OG, bits)
    outside = naive["inside"] == 0
    assert (~outside).sum() > 50
    assert (outside & (naive["by_scale"] > 0)).sum() > 50
    assert (outside & (naive["by_scale"] <= 0)).sum() > 50
    assert not symmetric or (s_OG < 0).any()


def test_a_frozen_zero_point_gets_no_gradient() -> None:
    w_OI, s_OG, z_OG = problem(3, (5, 3, 8), symmetric=True)
    z_OG.requires_grad_(False)
    fake_quantize(w_OI, s_OG, z_OG, 3).sum().backward()
    assert z_OG.grad is None
    assert w_OI.grad is not None
    assert s_OG.grad is not None


def test_one_element_of_each_kind_by_hand() -> None:
    weight = torch.tensor([[-9.0, -1.0, 0.3, 2.4, 9.0]], dtype=torch.float64, requires_grad=True)
    scale = torch.tensor([[2.0]], dtype=torch.float64, requires_grad=True)
    zero = torch.tensor([[0.8]], dtype=torch.float64, requires_grad=True)
    # u = -4.5, -0.5, 0.15, 1.2, 4.5; codes -4 + 1 -> 0, 0 + 1, 0 + 1, 1 + 1, 4 + 1 -> 3
    value = fake_quantize(weight, scale, zero, 2)
    assert value.tolist() == [[-2.0, 0.0, 0.0, 2.0, 4.0]]
    per_element = [torch.autograd.grad(v, (weight, scale, zero), retain_graph=True) for v in value[0]]
    assert [by_weight[0].tolist().count(1.0) for by_weight, _, _ in per_element] == [0, 1, 1, 1, 0]
    assert [by_scale.item() for _, by_scale, _ in per_element] == pytest.approx([-1.0, 0.5, -0.15, -0.2, 2.0])
    assert [by_zero.item() for _, _, by_zero in per_element] == [-2.0, 0.0, 0.0, 0.0, -2.0]


def test_halves_round_to_even() -> None:
    weight = torch.tensor([[-2.5, -1.5, -0.5, 0.5, 1.5, 2.5]], dtype=torch.float64)
    one = torch.ones(1, 1, dtype=torch.float64)
    assert fake_quantize(weight, one, 4 * one, 4).tolist() == [[-2.0, -2.0, 0.0, 0.0, 2.0, 2.0]]
    for zero, rounded in [(0.5, 0.0), (1.5, 2.0), (2.5, 2.0)]:
        lowest = fake_quantize(torch.full((1, 1), -9.0, dtype=torch.float64), one, zero * one, 4)
        assert lowest.item() == -rounded


def test_the_ends_of_the_range_count_as_inside() -> None:
    weight = torch.tensor([[-1.0, 2.0]], requires_grad=True)
    scale = torch.ones(1, 1)
    fake_quantize(weight, scale, scale, 2).sum().backward()
    assert weight.grad is not None
    assert weight.grad.tolist() == [[1.0, 1.0]]


@pytest.mark.parametrize("symmetric", [False, True], ids=["asymmetric", "symmetric"])
def test_gradients_are_those_of_rounding_held_fixed(symmetric: bool) -> None:
    """Straight-through: what rounding adds is a constant. That function is smooth; differentiate it numerically."""
    bits, shape, step = 3, (3, 2, 32), 1e-6
    w_OI, s_OG, z_OG = problem(bits, shape, symmetric=symmetric)
    grad_OI = torch.randn_like(w_OI)
    found = torch.autograd.grad(fake_quantize(w_OI, s_OG, z_OG, bits), (w_OI, s_OG), grad_OI)

    in_features = w_OI.shape[1]
    inside_OI = fake_quantize_elements(w_OI, s_OG, z_OG, bits)["inside"].bool()
    u_OI = w_OI.detach() / per_weight(s_OG.detach(), in_features)
    zr_OI = per_weight(z_OG.detach().round(), in_features)
    clipped_OI = (u_OI.round() + zr_OI).clamp(0, (1 << bits) - 1)

    def loss(w_OI: Tensor, s_OG: Tensor) -> Tensor:
        s_OI = per_weight(s_OG, in_features)
        rounded_OI = w_OI / s_OI + (u_OI.round() - u_OI)
        return (torch.where(inside_OI, rounded_OI, clipped_OI - zr_OI) * s_OI * grad_OI).sum()

    arguments = (w_OI.detach(), s_OG.detach())
    for index, analytic in enumerate(found):
        numeric = torch.zeros_like(analytic)
        for place in range(analytic.numel()):
            nudge = torch.zeros_like(analytic).flatten()
            nudge[place] = step
            up, down = list(arguments), list(arguments)
            up[index] = up[index] + nudge.view_as(analytic)
            down[index] = down[index] - nudge.view_as(analytic)
            numeric.view(-1)[place] = (loss(*up) - loss(*down)) / (2 * step)
        # a central difference in float64 is good to about 1e-9
        assert_close(numeric, analytic, "gradient", torch.float32)


def test_scale_gradient_of_clipped_weights_is_a_true_derivative() -> None:
    _, s_OG, z_OG = problem(3, (4, 2, 9))
    w_OI = torch.randn(4, 18, dtype=torch.float64).sign() * 100

    def run(scale: Tensor) -> Tensor:
        return fake_quantize(w_OI, scale, z_OG.detach(), 3)

    assert torch.autograd.gradcheck(run, (s_OG,))


@pytest.mark.parametrize("bits", [2, 4])
def test_float32_rounds_like_float64(bits: int) -> None:
    w_OI, s_OG, z_OG = (tensor.detach().float() for tensor in problem(bits, (5, 3, 64)))
    expected = fake_quantize_elements(w_OI, s_OG, z_OG, bits)["value"]
    found = fake_quantize(w_OI, s_OG, z_OG, bits)
    assert found.dtype is torch.float32
    assert_close(found, expected, "elementwise")


def test_group_size_minus_one_is_one_group_per_row() -> None:
    w_OI, s_O1, z_O1 = problem(2, (4, 1, 30))
    whole = fake_quantize(w_OI, s_O1, z_O1, 2)
    split = fake_quantize(w_OI, s_O1.expand(-1, 3), z_O1.expand(-1, 3), 2)
    assert torch.equal(whole, split)


def test_views_and_expanded_gradients() -> None:
    w_OI, s_OG, z_OG = problem(3, (5, 3, 8))
    expected = torch.autograd.grad(fake_quantize(w_OI, s_OG, z_OG, 3).sum(), (w_OI, s_OG, z_OG))
    view = w_OI.detach().T.contiguous().T.requires_grad_()
    assert not view.is_contiguous()
    found = torch.autograd.grad(fake_quantize(view, s_OG, z_OG, 3).sum(), (view, s_OG, z_OG))
    for left, right in zip(found, expected, strict=True):
        assert_close(left, right, "gradient")


@pytest.mark.parametrize("elements", [1, 24, 50, 1000])
@pytest.mark.parametrize("symmetric", [False, True], ids=["asymmetric", "symmetric"])
def test_slices_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch, symmetric: bool, elements: int) -> None:
    inputs = problem(3, (5, 3, 8), symmetric=symmetric)
    grad_OI = torch.randn(24, 5, dtype=torch.float64).T
    whole = fake_quantize(*inputs, 3)
    expected = torch.autograd.grad(whole, inputs, grad_OI)
    monkeypatch.setattr(reference, "SLICE", elements)
    sliced = fake_quantize(*inputs, 3)
    assert torch.equal(sliced, whole)
    for left, right in zip(torch.autograd.grad(sliced, inputs, grad_OI), expected, strict=True):
        assert_close(left, right, "gradient")


def test_the_inputs_are_left_alone() -> None:
    inputs = problem(3, (5, 3, 8))
    before = [tensor.detach().clone() for tensor in inputs]
    fake_quantize(*inputs, 3).sum().backward()
    for tensor, copy in zip(inputs, before, strict=True):
        assert torch.equal(tensor, copy)


@pytest.mark.parametrize("symmetric", [False, True], ids=["asymmetric", "symmetric"])
def test_nothing_is_kept_but_the_inputs(symmetric: bool) -> None:
    inputs = problem(3, (5, 3, 8), symmetric=symmetric)
    kept: list[Any] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        value = fake_quantize(*inputs, 3)
    assert {tensor.data_ptr() for tensor in kept} == {tensor.data_ptr() for tensor in inputs}
    value.sum().backward()


def test_under_autocast_the_result_is_rounded_once_for_the_product() -> None:
    w_OI, s_OG, z_OG = (tensor.detach().float().requires_grad_() for tensor in problem(3, (5, 3, 64)))
    with torch.autocast("cpu", torch.bfloat16):
        value = fake_quantize(w_OI, s_OG, z_OG, 3)
    wide = fake_quantize(w_OI, s_OG, z_OG, 3)
    assert torch.equal(value, wide.bfloat16())
    grad_OI = torch.randn_like(value)
    found = torch.autograd.grad(value, (w_OI, s_OG, z_OG), grad_OI)
    expected = torch.autograd.grad(wide, (w_OI, s_OG, z_OG), grad_OI.float())
    assert torch.equal(found[0], expected[0])
    for sums, wanted in zip(found[1:], expected[1:], strict=True):
        assert_close(sums, wanted, "gradient")


def test_with_its_product_nothing_is_kept_but_the_inputs() -> None:
    w_OI, s_OG, z_OG = problem(3, (5, 3, 8))
    x = torch.randn(2, 4, 24, dtype=torch.float64, requires_grad=True)
    kept: list[Any] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        y = fake_quant_linear(x, w_OI, s_OG, z_OG, 3)
    assert {tensor.data_ptr() for tensor in kept} == {tensor.data_ptr() for tensor in (x, w_OI, s_OG, z_OG)}
    expected = torch.nn.functional.linear(x, fake_quantize(w_OI, s_OG, z_OG, 3))
    assert torch.equal(y, expected)
    grad = torch.randn_like(y)
    leaves = (x, w_OI, s_OG, z_OG)
    found = torch.autograd.grad(y, leaves, grad)
    for left, right in zip(found, torch.autograd.grad(expected, leaves, grad), strict=True):
        assert_close(left, right, "gradient")


def test_an_input_that_needs_no_gradient_gets_none_and_the_rest_is_the_same() -> None:
    inputs = problem(3, (5, 3, 8))
    x = torch.randn(4, 24, dtype=torch.float64)
    expected = torch.autograd.grad(fake_quant_linear(x.clone().requires_grad_(), *inputs, 3).sum(), inputs)
    found = torch.autograd.grad(fake_quant_linear(x, *inputs, 3).sum(), inputs)
    for left, right in zip(found, expected, strict=True):
        assert torch.equal(left, right)
