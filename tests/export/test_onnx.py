"""Olive's tensors, read as MatMulNBits reads them: every code, step size and zero point; what is refused; a folder."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from eqat_mm.errors import ExportError
from eqat_mm.export.form import Choices, format_called
from eqat_mm.export.onnx import BITS, blocks
from eqat_mm.export.opened import open_packed
from eqat_mm.quant.spec import QuantSpec
from eqat_mm.verify.formats.onnx import parts
from tests.export.foreign_layouts import from_matmul_nbits
from tests.export.made import packed, packed_llava
from tests.export.weights import arrays, assert_holds, assert_same_grid, made

FORM = format_called("onnx")
GRID = list(itertools.product(BITS, (32, 64, 128, 256, -1), (True, False), ("bfloat16", "float16")))


@pytest.mark.parametrize("columns", [256, 768])
@pytest.mark.parametrize(("bits", "size", "symmetric", "dtype"), GRID)
def test_every_code_step_and_zero_point(bits: int, size: int, symmetric: bool, dtype: Any, columns: int) -> None:
    one = made(QuantSpec(bits, size, symmetric, dtype), columns=columns)
    block = min(one.weight.group_size, 256)
    tensors = blocks(one.weight, block)
    assert tensors["qweight"].dtype is torch.uint8
    assert torch.equal(tensors["qweight"].view(torch.int32), one.weight.words())
    assert_same_grid(from_matmul_nbits(arrays(tensors), bits, block), one)


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_language_model(tmp_path: Path, symmetric: bool) -> None:
    model = open_packed(packed(tmp_path, QuantSpec(4, -1, symmetric), attention_bias=True))
    FORM.refuse(model, Choices())
    usage = FORM.write(model, tmp_path / "out", Choices())
    assert "nodes_to_exclude=/lm_head/MatMul" in "".join(usage)
    entry = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert (entry["quant_method"], entry["bits"], entry["symmetric"]) == ("olive", 4, symmetric)
    assert entry["group_size"] == 64  # a row of 64 and one of 128 share it
    assert_holds(tmp_path / "out", model, FORM, parts)


def test_three_bits_are_refused(tmp_path: Path) -> None:
    model = open_packed(packed(tmp_path, QuantSpec(3, 64)))
    with pytest.raises(ExportError) as raised:
        FORM.refuse(model, Choices())
    assert raised.value.given == "3 bits"


@pytest.mark.parametrize("kind", ["olmo2", "mixtral"])
def test_language_models_that_are_not_built_are_refused(tmp_path: Path, kind: str) -> None:
    model = open_packed(packed(tmp_path, QuantSpec(4, 32, symmetric=True), kind))
    with pytest.raises(ExportError, match=kind):
        FORM.refuse(model, Choices())


def test_llavas_are_refused(tmp_path: Path) -> None:
    model = open_packed(packed_llava(tmp_path, QuantSpec(4, 32)))
    with pytest.raises(ExportError, match="llava"):
        FORM.refuse(model, Choices())


def test_odd_groups_are_refused(tmp_path: Path) -> None:
    changes = {"hidden_size": 72, "intermediate_size": 100, "num_key_value_heads": 1}
    model = open_packed(packed(tmp_path, QuantSpec(4, -1), **changes))
    with pytest.raises(ExportError, match="groups of 100 weights"):
        FORM.refuse(model, Choices())
