"""What others read from our folders: transformers with compressed-tensors, without a line of this package."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from compressed_tensors.quantization import QuantizationConfig
from torch import Tensor

import eqat_mm
from eqat_kernels import unpack
from eqat_mm.quant.spec import QuantSpec
from eqat_mm.runtime.files import read_json
from tests.checkpoint.conftest import Pack
from tests.checkpoint.foreign import assert_read_alike, foreign, logits_of, logits_of_a_stranger, packed_linears
from tests.tiny_model import mixed_bits
from tests.tolerances import assert_close

GRID = [
    QuantSpec(bits, group, symmetric)
    for bits, group, symmetric in itertools.product((2, 3, 4, 8), (32, 64, -1), (True, False))
]
ODD: dict[str, Any] = {"hidden_size": 72, "intermediate_size": 100, "num_key_value_heads": 1}
"""Rows of 72 and 100 codes and columns of 18 zero points: neither fills whole words at 2, 3 or 4 bits."""


def by_name(spec: QuantSpec) -> str:
    return spec.name


@pytest.mark.parametrize("spec", GRID, ids=by_name)
def test_transformers_reads_the_same_model(pack: Pack, tokens: Tensor, spec: QuantSpec) -> None:
    assert_read_alike(pack(spec), spec, {"input_ids": tokens})


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_transformers_reads_padded_words(pack: Pack, tokens: Tensor, bits: int, symmetric: bool) -> None:
    spec = QuantSpec(bits, -1, symmetric)
    assert_read_alike(pack(spec, **ODD), spec, {"input_ids": tokens})


@pytest.mark.parametrize("symmetric", [True, False])
def test_transformers_reads_float16_scales(pack: Pack, tokens: Tensor, symmetric: bool) -> None:
    spec = QuantSpec(4, 64, symmetric, scale_dtype="float16")
    assert_read_alike(pack(spec), spec, {"input_ids": tokens})


@pytest.mark.parametrize("symmetric", [True, False])
def test_transformers_reads_biases(pack: Pack, tokens: Tensor, symmetric: bool) -> None:
    spec = QuantSpec(2, 64, symmetric)
    assert_read_alike(pack(spec, attention_bias=True, mlp_bias=True), spec, {"input_ids": tokens})


@pytest.mark.parametrize("symmetric", [True, False])
def test_transformers_reads_a_tied_head(pack: Pack, tokens: Tensor, symmetric: bool) -> None:
    spec = QuantSpec(2, 64, symmetric)
    assert_read_alike(pack(spec, tie_word_embeddings=True), spec, {"input_ids": tokens})


def test_a_process_without_this_package_reads_it(pack: Pack, tokens: Tensor, tmp_path: Path) -> None:
    folder, inputs = pack(QuantSpec(2, 64)), {"input_ids": tokens}
    logits = logits_of_a_stranger(folder, "AutoModelForCausalLM", inputs, tmp_path)
    assert torch.equal(logits, logits_of(foreign(folder), inputs))
    assert_close(logits_of(eqat_mm.load(folder), inputs), logits, "model", torch.bfloat16)


def test_transformers_reads_bits_that_differ_on_the_symmetric_grid(pack: Pack, tokens: Tensor, tmp_path: Path) -> None:
    spec = QuantSpec(2, 32, symmetric=True, allocation=mixed_bits())
    folder, inputs = pack(spec), {"input_ids": tokens}
    assert {linear.layout.bits for linear in packed_linears(eqat_mm.load(folder)).values()} == {2, 3, 4}
    assert_read_alike(folder, spec, inputs)
    logits = logits_of_a_stranger(folder, "AutoModelForCausalLM", inputs, tmp_path)
    assert torch.equal(logits, logits_of(foreign(folder), inputs))


def test_transformers_refuses_bits_that_differ_on_the_asymmetric_grid(pack: Pack, tokens: Tensor) -> None:
    """Aloud: with `dequantize`, as in other asymmetric folders, it would take the bits of the first group for all."""
    folder = pack(QuantSpec(2, 32, allocation=mixed_bits()))
    with pytest.raises(RuntimeError, match="mismatched_sizes"):
        foreign(folder)
    assert logits_of(eqat_mm.load(folder), {"input_ids": tokens}).isfinite().all()


@pytest.mark.parametrize("spec", GRID, ids=by_name)
def test_the_library_unpacks_our_codes_bit_for_bit(pack: Pack, spec: QuantSpec) -> None:
    assert_unpacked_alike(pack(spec), spec)


@pytest.mark.parametrize("spec", [spec for spec in GRID if spec.group_size == -1], ids=by_name)
def test_the_library_unpacks_padded_words(pack: Pack, spec: QuantSpec) -> None:
    assert_unpacked_alike(pack(spec, **ODD), spec)


def assert_unpacked_alike(folder: Path, spec: QuantSpec) -> None:
    for linear in packed_linears(eqat_mm.load(folder, verify=False)).values():
        shape = (linear.layout.out_features, linear.layout.in_features)
        codes = unpack(linear.weight_packed, spec.bits, shape[1])
        theirs = unpack_from_int32(linear.weight_packed, spec.bits, torch.Size(shape))
        assert torch.equal(theirs.int() + spec.middle, codes.int())
        assert torch.equal(pack_to_int32(theirs, spec.bits), linear.weight_packed)
        assert codes.max() > spec.middle
        if spec.symmetric:
            assert linear.weight_zero_point is None
            continue
        assert linear.weight_zero_point is not None
        columns = torch.Size((shape[0], linear.layout.groups))
        zeros = unpack(linear.weight_zero_point.T, spec.bits, shape[0]).T
        theirs = unpack_from_int32(linear.weight_zero_point, spec.bits, columns, packed_dim=0)
        assert torch.equal(theirs.int() + spec.middle, zeros.int())
        assert torch.equal(pack_to_int32(theirs.contiguous(), spec.bits, packed_dim=0), linear.weight_zero_point)


@pytest.mark.parametrize("spec", GRID, ids=by_name)
def test_the_library_dequantizes_as_we_do(pack: Pack, spec: QuantSpec) -> None:
    folder = pack(spec)
    entry = read_json(folder / "config.json")["quantization_config"]
    scheme = QuantizationConfig.model_validate(entry).config_groups["group_0"]
    for linear in packed_linears(eqat_mm.load(folder, verify=False)).values():
        state = {name: tensor.detach() for name, tensor in linear.state_dict().items()}
        weight = PackedQuantizationCompressor.decompress(state, scheme)["weight"]
        assert torch.equal(weight, linear.dequantize())
