"""GPTQ's tensors, read by their definition: every code, step size and zero point; what is refused; whole folders."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from eqat_mm.errors import ExportError
from eqat_mm.export.form import Choices, format_called
from eqat_mm.export.gptq import transposed
from eqat_mm.export.opened import open_packed
from eqat_mm.quant.spec import QuantSpec
from eqat_mm.verify.formats.gptq import parts
from tests.export.foreign_layouts import from_gptq
from tests.export.made import packed, packed_llava
from tests.export.weights import OUT, arrays, assert_holds, assert_same_grid, made

FORM = format_called("gptq")
GRID = list(itertools.product((2, 3, 4, 8), (32, 64, 128, 256, -1), (True, False), ("bfloat16", "float16")))


@pytest.mark.parametrize(("bits", "size", "symmetric", "dtype"), GRID)
def test_every_code_step_and_zero_point(bits: int, size: int, symmetric: bool, dtype: Any) -> None:
    one = made(QuantSpec(bits, size, symmetric, dtype))
    tensors = transposed(one.weight)
    assert torch.equal(tensors["qweight"].T, one.weight.words())
    assert tensors["scales"].dtype is torch.float16
    assert all(tensor.is_contiguous() for tensor in tensors.values())
    assert_same_grid(from_gptq(arrays(tensors), bits), one)
    assert not FORM.changed(one.weight).any()


def test_steps_that_half_precision_rounds_are_counted_and_held_as_rounded() -> None:
    one = made(QuantSpec(4, 64), smallest=3e-7)
    assert FORM.changed(one.weight).float().mean() > 0.5
    steps = one.steps.half().double()
    assert torch.equal(FORM.held(one.weight).double(), (one.codes - one.zeros) * steps)


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_language_model(tmp_path: Path, symmetric: bool) -> None:
    model = open_packed(packed(tmp_path, QuantSpec(3, 64, symmetric), attention_bias=True))
    FORM.refuse(model, Choices())
    FORM.write(model, tmp_path / "out", Choices())
    entry = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert (entry["quant_method"], entry["checkpoint_format"]) == ("gptq", "gptq_v2")
    assert (entry["bits"], entry["group_size"], entry["sym"]) == (3, 64, symmetric)
    assert entry["block_name_to_quantize"] == "model.layers"
    assert_holds(tmp_path / "out", model, FORM, parts)


def test_a_llava_has_the_names_of_its_modules(tmp_path: Path) -> None:
    model = open_packed(packed_llava(tmp_path, QuantSpec(4, 32)))
    FORM.refuse(model, Choices())
    FORM.write(model, tmp_path / "out", Choices())
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["block_name_to_quantize"] == "model.language_model.layers"
    names = {part.name for part in parts(tmp_path / "out")}
    assert "model.language_model.layers.1.self_attn.q_proj.weight" in names
    assert "model.vision_tower.embeddings.class_embedding" in names


def test_other_llavas_are_refused_by_name(tmp_path: Path) -> None:
    model = open_packed(packed_llava(tmp_path, QuantSpec(2, 32), "llava_next"))
    with pytest.raises(ExportError, match="llava_next"):
        FORM.refuse(model, Choices())


@pytest.mark.parametrize(("rows", "columns"), [(OUT, 72), (72, 64)])
def test_words_filled_in_part_are_refused(rows: int, columns: int, tmp_path: Path) -> None:
    model = open_packed(packed(tmp_path, QuantSpec(4, -1)))
    model.weights["it"] = made(QuantSpec(4, -1), rows, columns).weight
    with pytest.raises(ExportError) as raised:
        FORM.refuse(model, Choices())
    assert raised.value.where == "--to gptq, at it"
    assert raised.value.given == f"a matrix of {rows} x {columns}"
