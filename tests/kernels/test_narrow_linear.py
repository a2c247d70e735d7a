"""Products with weights of 16 bits in float32, against float64; gradients; what is refused."""

from __future__ import annotations

import pytest
import torch

from eqat_kernels import cpu_library, narrow_linear
from tests.tolerances import assert_close

HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
needs_compiler = pytest.mark.skipif(cpu_library.obstacle() is not None, reason=str(cpu_library.obstacle()))
IMPLEMENTATIONS = pytest.mark.parametrize("impl", ["reference", pytest.param("cpu", marks=needs_compiler)])


@IMPLEMENTATIONS
@HALVES
def test_any_size(dtype: torch.dtype, impl: str) -> None:
    for rows in (1, 2, 4, 7, 9, 16, 17, 40):
        for columns in (1, 7, 16, 33, 100, 576):
            weight, bias = torch.randn(50, columns).to(dtype), torch.randn(50)
            x = torch.randn(rows, columns, requires_grad=True)
            y = narrow_linear(x, weight, bias, impl=impl)
            assert_close(y, x.double() @ weight.double().T + bias, "matmul")
            grad = torch.randn_like(y)
            assert_close(torch.autograd.grad(y, x, grad)[0], grad.double() @ weight.double(), "matmul")


@needs_compiler
def test_every_float16_is_read_exactly() -> None:
    raw = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.float16)
    weight = raw[raw.isfinite()].reshape(-1, 1).contiguous()
    assert torch.equal(narrow_linear(torch.ones(1, 1), weight)[0], weight.float()[:, 0])


@HALVES
def test_a_trained_weight_has_its_gradient(dtype: torch.dtype) -> None:
    weight, x = torch.randn(6, 8).to(dtype).requires_grad_(), torch.randn(3, 8)
    narrow_linear(x, weight).sum().backward()
    assert weight.grad is not None
    assert_close(weight.grad, x.double().sum(0).expand(6, -1), "matmul", dtype)


def test_autocast_decides_the_dtype_of_the_product() -> None:
    weight, x = torch.randn(6, 8).half(), torch.randn(3, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert narrow_linear(x, weight).dtype is torch.bfloat16


def test_wrong_sizes_are_refused() -> None:
    weight = torch.zeros(6, 8, dtype=torch.bfloat16)
    for arguments in ((torch.zeros(1, 7), weight), (torch.zeros(1, 8), weight.float()), (torch.zeros(1, 8), weight[0])):
        with pytest.raises(ValueError, match="not \\["):
            narrow_linear(*arguments)
    with pytest.raises(ValueError, match="bias"):
        narrow_linear(torch.zeros(1, 8), weight, torch.zeros(5))
