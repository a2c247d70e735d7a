"""Dequantization against W_hat = (W_int - z) * s written out."""

from __future__ import annotations

import pytest
import torch

from eqat_kernels import dequantize
from eqat_kernels.dequant.reference import centred_codes, zero_points
from tests.kernels.naive import per_weight, random_packed_weight
from tests.tolerances import assert_close

BITS = (2, 3, 4, 8)
SHAPES = [(1, 1, 32), (9, 3, 5), (10, 1, 17), (21, 2, 64)]
"""(O, G, g)"""


@pytest.mark.parametrize("symmetric", [False, True], ids=["asymmetric", "symmetric"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("bits", BITS)
def test_dequantize_is_the_naive_one(bits: int, shape: tuple[int, int, int], symmetric: bool) -> None:
    packed = random_packed_weight(bits, *shape, symmetric=symmetric)
    weight = dequantize(packed.words, packed.scale, packed.zero_words, packed.layout, torch.float64)
    assert torch.equal(weight, packed.dense())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", BITS)
def test_the_dtype_asked_for_is_given(bits: int, dtype: torch.dtype) -> None:
    packed = random_packed_weight(bits, 9, 3, 32)
    weight = dequantize(packed.words, packed.scale, packed.zero_words, packed.layout, dtype)
    assert weight.dtype is dtype
    assert_close(weight, packed.dense(), "elementwise")


def test_float32_is_the_default() -> None:
    packed = random_packed_weight(2, 3, 1, 32)
    assert dequantize(packed.words, packed.scale, packed.zero_words, packed.layout).dtype is torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", BITS)
def test_centred_codes_are_exact_in_every_dtype(bits: int, dtype: torch.dtype) -> None:
    packed = random_packed_weight(bits, 33, 3, 32)
    centred_OGg = centred_codes(packed.words, packed.zero_words, packed.layout, dtype)
    expected_OI = packed.codes_OI.int() - per_weight(packed.zero_OG.int(), 96)
    assert centred_OGg.shape == (33, 3, 32)
    assert torch.equal(centred_OGg.int().flatten(1), expected_OI)


@pytest.mark.parametrize("symmetric", [False, True], ids=["asymmetric", "symmetric"])
@pytest.mark.parametrize("bits", BITS)
def test_zero_points_are_unpacked_along_the_rows(bits: int, symmetric: bool) -> None:
    packed = random_packed_weight(bits, 18, 3, 32, symmetric=symmetric)
    zero_OG = zero_points(packed.zero_words, packed.layout, torch.device("cpu"))
    assert zero_OG.dtype is torch.uint8
    assert torch.equal(zero_OG, packed.zero_OG)
