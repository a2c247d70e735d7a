"""Packed words: the bit layout, and agreement with the format that serving engines read."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from torch import Tensor

from eqat_kernels import PackedLayout, pack, unpack
from tests.kernels.naive import pack_bits, random_codes

BITS = (2, 3, 4, 8)
LENGTHS = (*range(1, 67), 95, 96, 97, 127, 129)
"""Every way in which a row can end inside a byte, a run of codes or a word, and some longer rows."""


def signed(codes: Tensor, bits: int) -> Tensor:
    """Shift codes to the signed range that compressed-tensors works in."""
    return (codes.to(torch.int16) - (1 << (bits - 1))).to(torch.int8)


@pytest.mark.parametrize("bits", BITS)
def test_the_layout_is_the_bit_stream(bits: int) -> None:
    for length in LENGTHS:
        codes = random_codes(3, length, bits=bits)
        expected = torch.tensor([pack_bits(row, bits) for row in codes.tolist()], dtype=torch.int32)
        words = pack(codes, bits)
        assert words.dtype is torch.int32
        assert torch.equal(words, expected), f"length {length}"


@pytest.mark.parametrize("bits", BITS)
def test_unpack_inverts_pack(bits: int) -> None:
    for length in LENGTHS:
        codes = random_codes(3, length, bits=bits)
        words = torch.tensor([pack_bits(row, bits) for row in codes.tolist()], dtype=torch.int32)
        unpacked = unpack(words, bits, length)
        assert unpacked.dtype is torch.uint8
        assert torch.equal(unpacked, codes), f"length {length}"


@pytest.mark.parametrize("bits", BITS)
def test_the_weights_are_those_of_compressed_tensors(bits: int) -> None:
    for length in LENGTHS:
        codes = random_codes(5, length, bits=bits)
        theirs = pack_to_int32(signed(codes, bits), bits)
        assert torch.equal(pack(codes, bits), theirs), f"length {length}"
        assert torch.equal(unpack_from_int32(pack(codes, bits), bits, codes.shape), signed(codes, bits))
        assert torch.equal(unpack(theirs, bits, length), codes), f"length {length}"


@pytest.mark.parametrize("bits", BITS)
def test_the_zero_points_are_those_of_compressed_tensors(bits: int) -> None:
    for rows in LENGTHS:
        zero_OG = random_codes(rows, 3, bits=bits)
        words = pack(zero_OG.T.contiguous(), bits).T.contiguous()
        theirs = pack_to_int32(signed(zero_OG, bits), bits, packed_dim=0)
        assert torch.equal(words, theirs), f"{rows} rows"
        assert torch.equal(unpack_from_int32(words, bits, zero_OG.shape, packed_dim=0), signed(zero_OG, bits))
        assert torch.equal(unpack(theirs.T, bits, rows).T, zero_OG), f"{rows} rows"


@pytest.mark.parametrize(("bits", "words"), [(2, 2), (3, 3), (4, 4), (8, 8)])
def test_a_code_takes_its_bits_and_no_more(bits: int, words: int) -> None:
    assert pack(random_codes(1, 32, bits=bits), bits).shape == (1, words)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_any_integer_dtype_packs_alike(bits: int, dtype: torch.dtype) -> None:
    codes = random_codes(2, 45, bits=bits)
    assert torch.equal(pack(codes.to(dtype), bits), pack(codes, bits))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", [(37,), (2, 3, 37), (0, 37)], ids=str)
def test_leading_dimensions_are_kept(bits: int, shape: tuple[int, ...]) -> None:
    codes = random_codes(*shape, bits=bits)
    words = pack(codes, bits)
    assert words.shape == (*shape[:-1], -(-37 * bits // 32))
    assert torch.equal(unpack(words, bits, 37), codes)


@pytest.mark.parametrize("bits", BITS)
def test_views_pack_like_copies(bits: int) -> None:
    codes = random_codes(41, 6, bits=bits)
    words = pack(codes.T, bits)
    assert torch.equal(words, pack(codes.T.contiguous(), bits))
    assert torch.equal(unpack(words.T.contiguous().T, bits, 41), codes.T)


@pytest.mark.parametrize("bits", BITS)
def test_strides_of_single_rows_and_words_do_not_matter(bits: int) -> None:
    codes = random_codes(3, 1, bits=bits)
    words = torch.empty(1, 3, dtype=torch.int32).copy_(pack(codes, bits).T).T
    assert words.stride() == (1, 3)
    assert torch.equal(unpack(words, bits, 1), codes)
    for length in range(1, 34):
        row = torch.empty(length, 1, dtype=torch.uint8).copy_(random_codes(length, 1, bits=bits)).T
        assert torch.equal(unpack(pack(row, bits), bits, length), row), f"length {length}"


@pytest.mark.parametrize("bits", BITS)
def test_the_codes_are_left_alone(bits: int) -> None:
    codes = random_codes(2, 19, bits=bits)
    before = codes.clone()
    unpack(pack(codes, bits), bits, 19)
    assert torch.equal(codes, before)


def test_groups_of_a_layout() -> None:
    assert PackedLayout(bits=3, group_size=32, out_features=5, in_features=96).groups == 3
