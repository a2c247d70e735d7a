"""What numpy reads of a checkpoint is what is in it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import eqat_mm
from eqat_kernels import pack
from eqat_mm.quant.packed_linear import PackedLinear
from eqat_mm.verify.held import unpacked
from eqat_mm.verify.packed import opened
from eqat_mm.verify.slabs import slabs_in
from tests.verify.conftest import Made


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("count", [1, 11, 32, 300])
def test_codes_are_those_that_were_packed(bits: int, count: int) -> None:
    codes = torch.randint(0, 1 << bits, (301, count), generator=torch.Generator().manual_seed(bits), dtype=torch.uint8)
    assert np.array_equal(unpacked(pack(codes, bits).numpy(), bits, count), codes.numpy())


def test_the_documented_example() -> None:
    words = np.array([[0x799985CD, 1]], np.uint32)
    assert unpacked(words, 3, 11).tolist() == [[5, 1, 7, 2, 0, 3, 6, 4, 1, 7, 5]]


def test_weights_are_those_of_the_loaded_model(made: Made) -> None:
    one, model = opened(made.tuned), eqat_mm.load(made.tuned)
    assert len(one.linears) == 14
    for linear in one.linears:
        packed = model.get_submodule(linear)
        assert isinstance(packed, PackedLinear)
        assert np.array_equal(one.held(linear).weight(), packed.dequantize().numpy())


def test_numbers_of_every_dtype_are_those_that_torch_reads(made: Made) -> None:
    for path in sorted(made.rounded.glob("*.safetensors")):
        theirs = load_file(path)
        slabs = slabs_in(path)
        assert slabs.keys() == theirs.keys()
        assert {slab.dtype for slab in slabs.values()} <= {"BF16", "I32", "I64"}
        assert all(np.array_equal(slab.numbers(), theirs[name].float().numpy()) for name, slab in slabs.items())


def test_a_truncated_file_is_named(made: Made, tmp_path: Path) -> None:
    path = next(made.rounded.glob("*.safetensors"))
    for length in (0, 5, 100, path.stat().st_size - 1):
        (tmp_path / path.name).write_bytes(path.read_bytes()[:length])
        with pytest.raises(ValueError, match=path.name):
            slabs_in(tmp_path / path.name)
