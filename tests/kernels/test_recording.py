"""A recorded run made again: every translated op against torch, what is not translated, and what cannot be recorded."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention, silu

from eqat_kernels import cpu_library, quant_linear
from eqat_kernels.recording import record
from tests.kernels.naive import random_packed_weight
from tests.tolerances import assert_close

pytestmark = pytest.mark.skipif(cpu_library.obstacle() is not None, reason=str(cpu_library.obstacle()))

OPS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": lambda a, b: a + b,
    "add a number": lambda a, b: a + 1e-5,
    "add a half": lambda a, b: torch.add(a, b, alpha=0.5),
    "add in place": lambda a, b: a.clone().add_(b),
    "multiply": lambda a, b: a * b,
    "multiply rows": lambda a, b: a * b[:, :1],
    "multiply a column": lambda a, b: a * b[0],
    "square": lambda a, b: a.pow(2) + b.pow(3),
    "negate": lambda a, b: -a[:, 1:],
    "rsqrt": lambda a, b: a.abs().rsqrt(),
    "silu": lambda a, b: silu(a * 20),
    "mean": lambda a, b: a.mean(-1, keepdim=True) + b.mean(0),
    "join": lambda a, b: torch.cat([a[:, 3:], b, -a[:, :3]], -1),
    "join rows": lambda a, b: torch.cat([a, b]),
    "turned": lambda a, b: a.T * b.T,
    "reshaped": lambda a, b: a.T.reshape(-1) + 1,
    "softmax": lambda a, b: a.softmax(-1),
    "float64": lambda a, b: a.double() * b,
    "whole numbers": lambda a, b: (a * 8).long() + 3,
    "more dimensions": lambda a, b: a.view(1, 1, 1, *a.shape) * b,
}


@pytest.mark.parametrize("op", OPS)
def test_an_op_again_on_other_values(op: str) -> None:
    a, b = torch.randn(2, 3, 20)
    recording = record(lambda: OPS[op](a, b))
    assert torch.equal(recording.result, OPS[op](a, b))
    a.copy_(torch.randn(3, 20))
    b.mul_(-2)
    recording()
    if recording.result.is_floating_point():
        assert_close(recording.result, OPS[op](a, b), "matmul", torch.float32)
    else:
        assert torch.equal(recording.result, OPS[op](a, b))


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_attention(scale: float | None, shared: bool) -> None:
    q, k, v = torch.randn(5, 3, 2, 8).transpose(1, 2), torch.randn(5, 2, 9, 8), torch.randn(5, 2, 9, 8)
    mask = torch.zeros(1 if shared else 5, 1, 1, 9)
    mask[..., 5:] = torch.finfo(torch.float32).min
    v[:, :, 5:] = 1e30  # where nothing is yet

    def run() -> Tensor:
        return scaled_dot_product_attention(q, k, v, mask, scale=scale)

    recording = record(run)
    q.copy_(torch.randn_like(q))
    mask[..., 5] = 0
    v[:, :, 5] = 2.0
    recording()
    assert_close(recording.result, run(), "matmul")


def test_a_cache_grows_in_place() -> None:
    cache, slot, new = torch.zeros(1, 2, 6, 4), torch.tensor([0]), torch.randn(1, 2, 1, 4)

    def run() -> Tensor:
        cache.index_copy_(2, slot, new)
        slot.add_(1)
        return cache

    recording = record(run)
    first = new.clone()
    new.neg_()
    recording()
    assert torch.equal(cache[:, :, :2], torch.cat([first, new], 2))
    assert slot.tolist() == [2]
    assert not cache[:, :, 2:].any()


def test_products_of_packed_weights_are_made_again() -> None:
    packed, x, bias = random_packed_weight(4, 48, 2, 32), torch.randn(1, 64), torch.randn(48)

    def run() -> Tensor:
        return quant_linear(x, packed.words, packed.scale, packed.zero_words, packed.layout, bias)

    recording = record(run)
    x.copy_(torch.randn(1, 64))
    recording()
    assert torch.equal(recording.result, run())


def test_a_module_is_recorded_whole() -> None:
    model, x = nn.Sequential(nn.Linear(8, 16), nn.SiLU(), nn.LayerNorm(16)), torch.randn(1, 8)
    recording = record(lambda: model(x))
    x.neg_()
    recording()
    assert_close(recording.result, model(x), "matmul")


def test_what_decides_by_values_is_refused() -> None:
    x = torch.ones(1)
    with pytest.raises(RuntimeError, match="decide by the values"):
        record(lambda: x * 2 if x.sum() > 0 else x)
