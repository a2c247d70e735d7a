"""MLX's tensors, read by their definition: every code, step size and zero point; what is refused; whole folders."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from eqat_mm.errors import ExportError
from eqat_mm.export.form import Choices, format_called
from eqat_mm.export.mlx import affine
from eqat_mm.export.opened import PackedModel, open_packed
from eqat_mm.quant.spec import QuantSpec
from eqat_mm.verify.formats.mlx import parts
from tests.export.foreign_layouts import from_mlx
from tests.export.made import packed, packed_llava
from tests.export.weights import arrays, assert_holds, assert_same_grid, made

FORM = format_called("mlx")
GRID = list(itertools.product((2, 3, 4, 8), (32, 64, 128, 256, -1), (True, False), ("bfloat16", "float16")))


@pytest.mark.parametrize(("bits", "size", "symmetric", "dtype"), GRID)
def test_every_code_step_and_zero_point(bits: int, size: int, symmetric: bool, dtype: Any) -> None:
    one = made(QuantSpec(bits, size, symmetric, dtype))
    group = min(one.weight.group_size, 128)
    tensors = affine(one.weight, group)
    assert tensors["weight"].dtype is torch.uint32
    assert torch.equal(tensors["weight"].view(torch.int32), one.weight.words())
    assert_same_grid(from_mlx(arrays(tensors), bits, group), one)


@pytest.mark.parametrize(
    ("bits", "symmetric", "scale", "expected"),
    [
        (2, True, "bfloat16", torch.bfloat16),
        (8, True, "bfloat16", torch.bfloat16),
        (3, False, "bfloat16", torch.float16),
        (4, False, "bfloat16", torch.float32),  # 8 digits times 4
        (4, True, "float16", torch.float16),
        (2, False, "float16", torch.float32),
    ],
)
def test_offsets_are_as_wide_as_they_must_be(bits: int, symmetric: bool, scale: Any, expected: torch.dtype) -> None:
    tensors = affine(made(QuantSpec(bits, 64, symmetric, scale)).weight, 64)
    assert tensors["scales"].dtype is tensors["biases"].dtype is expected


def test_steps_below_half_precision_are_held() -> None:
    tensors = affine(made(QuantSpec(2, 64), smallest=1e-7).weight, 64)
    assert tensors["scales"].dtype is torch.float32


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> PackedModel:
    return open_packed(packed(tmp_path_factory.mktemp("llama"), QuantSpec(3, 64), attention_bias=True))


def test_a_language_model(llama: PackedModel, tmp_path: Path) -> None:
    FORM.refuse(llama, Choices())
    usage = FORM.write(llama, tmp_path, Choices())
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["quantization"] == {"group_size": 64, "bits": 3, "mode": "affine"}
    assert config["rope_theta"] == 10000.0
    assert "mlx_lm generate" in "".join(usage)
    assert_holds(tmp_path, llama, FORM, parts)


def test_a_llava_has_published_names_and_its_tower_as_it_was(tmp_path: Path) -> None:
    model = open_packed(packed_llava(tmp_path, QuantSpec(2, 32, symmetric=True)))
    FORM.refuse(model, Choices())
    assert "mlx_vlm generate" in "".join(FORM.write(model, tmp_path / "out", Choices()))
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"]
    shards = {name: value for file in set(index.values()) for name, value in load_file(tmp_path / "out" / file).items()}
    assert shards.keys() == index.keys()
    assert "language_model.model.layers.0.mlp.up_proj.scales" in shards
    for name in model.others:
        assert torch.equal(shards[model.published_name(name)], model.source.read(name)), name
    towers = [name for name in shards if name.startswith(("vision_tower.vision_model.", "multi_modal_projector."))]
    assert len(towers) > 10


@pytest.mark.parametrize(("changes", "given"), [({"rope": "llama3"}, "rotary"), ({"head_dim": 8}, "heads of 8")])
def test_towers_that_mlx_vlm_computes_differently(tmp_path: Path, changes: dict[str, Any], given: str) -> None:
    model = open_packed(packed_llava(tmp_path, QuantSpec(2, 32)))
    if "rope" in changes:
        model.text_config.rope_parameters["rope_type"] = changes["rope"]
    else:
        model.text_config.head_dim = changes["head_dim"]
    with pytest.raises(ExportError) as raised:
        FORM.refuse(model, Choices())
    assert given in raised.value.given


def test_other_llavas_are_refused_by_name(tmp_path: Path) -> None:
    model = open_packed(packed_llava(tmp_path, QuantSpec(2, 32), "llava_next"))
    with pytest.raises(ExportError, match="llava_next"):
        FORM.refuse(model, Choices())


def test_odd_groups_are_refused(tmp_path: Path) -> None:
    changes = {"hidden_size": 72, "intermediate_size": 100, "num_key_value_heads": 1}
    model = open_packed(packed(tmp_path, QuantSpec(4, -1), **changes))
    with pytest.raises(ExportError) as raised:
        FORM.refuse(model, Choices())
    assert raised.value.given == "groups of 100 weights"
    assert raised.value.where == "--to mlx, at model.layers.0.mlp.down_proj"
