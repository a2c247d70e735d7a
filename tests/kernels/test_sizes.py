"""No op takes a pointer to a tensor that is not what its layout says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from eqat_kernels import PackedLayout, dequantize, fake_quant_linear, fake_quantize, pack, quant_linear, unpack
from tests.kernels.naive import random_packed_weight

ROWS, COLUMNS, BITS = 6, 96, 3
IMPLEMENTATIONS = ("cpu", "reference", "auto")


def packed_arguments() -> dict[str, Any]:
    """Arguments of `dequantize` that fit one another."""
    packed = random_packed_weight(BITS, ROWS, 3, 32)
    return {"words": packed.words, "scale": packed.scale, "zero_words": packed.zero_words, "layout": packed.layout}


def product_arguments() -> dict[str, Any]:
    """Arguments of `quant_linear` that fit one another."""
    return {"x": torch.randn(2, COLUMNS), "bias": torch.randn(ROWS), **packed_arguments()}


def grid_arguments() -> dict[str, Any]:
    """Arguments of `fake_quantize` that fit one another."""
    return {
        "weight": torch.randn(ROWS, COLUMNS),
        "scale": torch.ones(ROWS, 3),
        "zero_point": torch.ones(ROWS, 3),
        "bits": BITS,
    }


OF_A_WEIGHT = {
    "words transposed": {"words": torch.zeros(9, 6, dtype=torch.int32)},
    "words of fewer rows": {"words": torch.zeros(5, 9, dtype=torch.int32)},
    "words too narrow": {"words": torch.zeros(6, 8, dtype=torch.int32)},
    "words as bytes": {"words": torch.zeros(6, 9, dtype=torch.int8)},
    "words without rows": {"words": torch.zeros(54, dtype=torch.int32)},
    "words on another device": {"words": torch.zeros(6, 9, dtype=torch.int32, device="meta")},
    "step sizes of fewer rows": {"scale": torch.ones(5, 3)},
    "step sizes of fewer groups": {"scale": torch.ones(6, 1)},
    "step sizes as integers": {"scale": torch.ones(6, 3, dtype=torch.int32)},
    "step sizes on another device": {"scale": torch.ones(6, 3, device="meta")},
    "zero points of fewer rows": {"zero_words": torch.zeros(0, 3, dtype=torch.int32)},
    "zero points of fewer groups": {"zero_words": torch.zeros(1, 2, dtype=torch.int32)},
    "zero points as bytes": {"zero_words": torch.zeros(1, 3, dtype=torch.uint8)},
    "a layout of more rows": {"layout": PackedLayout(BITS, 32, ROWS + 1, COLUMNS)},
    "a layout of more columns": {"layout": PackedLayout(BITS, 32, ROWS, COLUMNS + 32)},
    "a layout of more bits": {"layout": PackedLayout(4, 32, ROWS, COLUMNS)},
}
OF_A_PRODUCT: dict[str, dict[str, Any]] = {
    "x too narrow": {"x": torch.randn(2, COLUMNS - 1)},
    "x too wide": {"x": torch.randn(2, COLUMNS + 32)},
    "x of no dimension": {"x": torch.tensor(1.0)},
    "x as integers": {"x": torch.ones(2, COLUMNS, dtype=torch.int64)},
    "x on another device": {"x": torch.randn(2, COLUMNS, device="meta")},
    "bias of fewer rows": {"bias": torch.randn(ROWS - 1)},
    "bias of a row": {"bias": torch.randn(1)},
}
OF_A_GRID: dict[str, dict[str, Any]] = {
    "weight of one dimension": {"weight": torch.randn(ROWS * COLUMNS)},
    "weight of integers": {"weight": torch.ones(ROWS, COLUMNS, dtype=torch.int32)},
    "step sizes of fewer rows": {"scale": torch.ones(5, 3)},
    "step sizes that do not divide": {"scale": torch.ones(ROWS, 5), "zero_point": torch.ones(ROWS, 5)},
    "no step sizes": {"scale": torch.ones(ROWS, 0), "zero_point": torch.ones(ROWS, 0)},
    "zero points of fewer groups": {"zero_point": torch.ones(ROWS, 1)},
    "zero points of integers": {"zero_point": torch.ones(ROWS, 3, dtype=torch.int32)},
    "zero points on another device": {"zero_point": torch.ones(ROWS, 3, device="meta")},
    "5 bits": {"bits": 5},
}


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("change", OF_A_WEIGHT.values(), ids=OF_A_WEIGHT)
def test_a_packed_weight_that_is_not_what_its_layout_says(change: dict[str, Any], impl: str) -> None:
    with pytest.raises(ValueError, match="not"):
        dequantize(**(packed_arguments() | change), impl=impl)
    with pytest.raises(ValueError, match="not"):
        quant_linear(**(product_arguments() | change), impl=impl)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("change", OF_A_PRODUCT.values(), ids=OF_A_PRODUCT)
def test_a_product_that_does_not_fit(change: dict[str, Any], impl: str) -> None:
    with pytest.raises(ValueError, match="not"):
        quant_linear(**(product_arguments() | change), impl=impl)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("change", OF_A_GRID.values(), ids=OF_A_GRID)
def test_a_grid_that_does_not_fit(change: dict[str, Any], impl: str) -> None:
    with pytest.raises(ValueError, match=r"not|choose one"):
        fake_quantize(**(grid_arguments() | change), impl=impl)
    with pytest.raises(ValueError, match=r"not|choose one"):
        fake_quant_linear(torch.randn(2, COLUMNS), **(grid_arguments() | change), impl=impl)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("words", "bits", "length"),
    [
        (torch.zeros(2, 2, dtype=torch.int32), 3, 96),
        (torch.zeros(2, 3, dtype=torch.int8), 3, 32),
        (torch.tensor(0, dtype=torch.int32), 2, 16),
        (torch.zeros(2, 5, dtype=torch.int32), 5, 32),
    ],
)
def test_words_that_hold_other_codes(words: Tensor, bits: int, length: int, impl: str) -> None:
    with pytest.raises(ValueError, match=r"not|choose one"):
        unpack(words, bits, length, impl=impl)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_codes_that_cannot_be_packed(impl: str) -> None:
    for codes in (torch.tensor(1), torch.ones(2, 32)):
        with pytest.raises(ValueError, match="codes:"):
            pack(codes, 2, impl=impl)
    with pytest.raises(ValueError, match="5 bits"):
        pack(torch.ones(2, 32, dtype=torch.uint8), 5, impl=impl)


@pytest.mark.parametrize("numbers", [(5, 32, 4, 64), (2, 0, 4, 64), (2, 48, 4, 64), (2, 32, 0, 64), (2, 32, -4, 64)])
def test_a_layout_of_nothing(numbers: tuple[int, int, int, int]) -> None:
    with pytest.raises(ValueError, match=r"layout|divide"):
        PackedLayout(*numbers)


def test_the_registered_ops_check_for_themselves() -> None:
    """Compiled code reaches them without the functions in front."""
    good = product_arguments()
    tensors = good["words"], good["scale"], good["zero_words"]
    numbers = (*good["layout"].numbers, "auto")
    grad = torch.randn(2, ROWS)
    ops = torch.ops.eqat
    with pytest.raises(ValueError, match="packed codes"):
        ops.quant_linear(good["x"], tensors[0].T.contiguous(), *tensors[1:], None, *numbers)
    with pytest.raises(ValueError, match="gradient"):
        ops.quant_linear_backward(grad[:, :-1], good["x"], *tensors, *numbers, True, True)
    with pytest.raises(ValueError, match="packed codes"):
        ops.dequantize(tensors[0][:, :-1], *tensors[1:], torch.float32, *numbers)
    w, s, z, bits = grid_arguments().values()
    with pytest.raises(ValueError, match="step sizes"):
        ops.fake_quantize(w, s[1:], z, bits, torch.float32, "auto")
    with pytest.raises(ValueError, match="gradient"):
        ops.fake_quantize_backward(w[1:], w, s, z, bits, "auto")
