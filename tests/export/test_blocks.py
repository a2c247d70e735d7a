"""Blocks of GGUF hold the values of packed weights, read by another package where it knows the type."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor

from eqat_mm.export.gguf.blocks import Q2_0, Q4_0, Q4_1, Q8_0, BlockType, block_type, changed, held, packed, q8_0
from eqat_mm.export.opened import PackedWeight
from eqat_mm.quant.packed_linear import PackedLinear
from eqat_mm.quant.spec import QuantSpec

ROWS, COLUMNS = 6, 256


@dataclass(frozen=True)
class Memory:
    """Stands in for the files."""

    tensors: dict[str, Tensor]

    def read(self, name: str) -> Tensor:
        return self.tensors[name.removeprefix("layer.")]


def weight_of(spec: QuantSpec, scale: Tensor | None = None) -> PackedWeight:
    """Random codes and zero points; step sizes that the dtype holds, of either sign on the symmetric grid."""
    draw = torch.Generator().manual_seed(3)
    groups = COLUMNS // spec.group_of(COLUMNS, "layer")
    codes = torch.randint(0, spec.top + 1, (ROWS, COLUMNS), generator=draw, dtype=torch.uint8)
    zeros = torch.randint(0, spec.top + 1, (ROWS, groups), generator=draw).float()
    steps = torch.rand(ROWS, groups, generator=draw) * 0.02 + 1e-3
    if spec.symmetric:
        steps = steps * (1 - 2 * torch.randint(0, 2, steps.shape, generator=draw))
    linear = PackedLinear.from_codes(codes, steps if scale is None else scale.expand(ROWS, groups), zeros, None, spec)
    stored = {name: tensor.detach() for name, tensor in linear.state_dict().items()}
    stored["weight_scale"] = stored["weight_scale"].to(spec.storage_dtype)
    files: Any = Memory(stored)
    return PackedWeight("layer", spec, ROWS, COLUMNS, files)


def read_back(blocks: Tensor, kind: BlockType) -> Tensor:
    """What `gguf` makes of blocks; Q2_0 is newer than it: (c - 1) d, four codes a byte, the first lowest."""
    if kind is not Q2_0:
        values = gguf.quants.dequantize(blocks.numpy(), gguf.GGMLQuantizationType(kind.number))
        return torch.from_numpy(np.ascontiguousarray(values))
    raw = blocks.numpy().reshape(-1, 18)
    steps = raw[:, :2].copy().view(np.float16).astype(np.float32)
    codes = np.stack([raw[:, 2:] >> shift & 3 for shift in (0, 2, 4, 6)], -1).reshape(len(raw), 64)
    return torch.from_numpy(((codes.astype(np.float32) - 1) * steps).reshape(ROWS, COLUMNS))


EXACT = [
    (QuantSpec(2, 64, symmetric=True), Q2_0),
    (QuantSpec(2, 128, symmetric=True), Q2_0),
    (QuantSpec(2, -1, symmetric=True), Q2_0),
    (QuantSpec(2, 32, symmetric=True), Q4_0),
    (QuantSpec(3, 64, symmetric=True), Q4_0),
    (QuantSpec(4, 32, symmetric=True), Q4_0),
    (QuantSpec(4, 64, symmetric=True, scale_dtype="float16"), Q4_0),
    (QuantSpec(2, 64), Q4_1),
    (QuantSpec(3, 128), Q4_1),
    (QuantSpec(8, 64, symmetric=True), Q8_0),
]


@pytest.mark.parametrize(("spec", "kind"), EXACT, ids=lambda value: value.name)
def test_exact(spec: QuantSpec, kind: BlockType) -> None:
    weight = weight_of(spec)
    assert block_type(weight) is kind
    blocks = packed(weight, kind)
    assert blocks.shape == (ROWS, kind.row_bytes(COLUMNS))
    assert not changed(weight, kind).any()
    assert torch.equal(read_back(blocks, kind), weight.dense())
    assert torch.equal(held(weight, kind), weight.dense())


def test_four_asymmetric_bits_lose_some_offsets_and_say_which() -> None:
    weight = weight_of(QuantSpec(4, 64))
    groups = changed(weight, Q4_1)
    assert 0 < groups.sum() < groups.numel()
    found = read_back(packed(weight, Q4_1), Q4_1)
    assert torch.equal(found, held(weight, Q4_1))
    differs = (found != weight.dense()).unflatten(1, (groups.shape[1], -1)).any(-1)
    assert torch.equal(differs, groups)
    offset = weight.scale().float() * weight.zero_points()
    assert ((found - weight.dense()).abs() <= offset.repeat_interleave(64, 1) / 2**11).all()  # half an ulp


@pytest.mark.parametrize("scale", [1e-8, 1e5])
def test_a_step_size_out_of_the_range_of_half_precision_is_a_change(scale: float) -> None:
    weight = weight_of(QuantSpec(4, 64, symmetric=True), torch.tensor(scale))
    assert changed(weight, Q4_0).all()


@pytest.mark.parametrize("spec", [QuantSpec(8, 64), QuantSpec(8, -1)])
def test_eight_asymmetric_bits_have_no_type(spec: QuantSpec) -> None:
    assert block_type(weight_of(spec)) is None


def test_rows_in_another_order() -> None:
    weight, order = weight_of(QuantSpec(4, 64, symmetric=True)), torch.tensor([3, 0, 5, 1, 2, 4])
    assert torch.equal(read_back(packed(weight, Q4_0, order), Q4_0), weight.dense()[order])


def test_eight_bit_blocks_of_dense_weights_are_those_of_llama_cpp() -> None:
    dense = torch.randn(5, 96)
    dense[2, :32] = 0.0
    theirs = gguf.quants.quantize(dense.numpy(), gguf.GGMLQuantizationType.Q8_0)
    assert torch.equal(q8_0(dense), torch.from_numpy(theirs))
