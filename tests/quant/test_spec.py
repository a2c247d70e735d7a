"""QuantSpec: what it accepts, what it says about the rest, and its numbers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from eqat_mm.errors import CheckpointError, ConfigError
from eqat_mm.quant import QuantSpec
from eqat_mm.quant.spec import BITS, GROUP_SIZES
from tests.checkpoint.files import assert_four_lines


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("bits", BITS)
def test_every_combination_exists(bits: int, group_size: int, symmetric: bool) -> None:
    spec = QuantSpec(bits, group_size, symmetric)
    assert spec.top == 2**bits - 1
    assert spec.middle == 2 ** (bits - 1)
    assert QuantSpec(**json.loads(json.dumps(spec.as_dict()))) == spec


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("bits", 5, "2, 3, 4, 8"),
        ("bits", 16, "2, 3, 4, 8"),
        ("bits", 0, "2, 3, 4, 8"),
        ("bits", "4", "2, 3, 4, 8"),
        ("group_size", 48, "32, 64, 128, 256, -1"),
        ("group_size", 0, "32, 64, 128, 256, -1"),
        ("group_size", -2, "32, 64, 128, 256, -1"),
        ("scale_dtype", "float32", "bfloat16, float16"),
        ("scale_dtype", torch.bfloat16, "bfloat16, float16"),
    ],
)
def test_a_bad_field_is_named_with_what_is_allowed(field: str, value: Any, allowed: str) -> None:
    with pytest.raises(ConfigError) as error:
        QuantSpec(**{field: value})
    assert error.value.where == f"--quant.{field}"
    assert error.value.given == repr(value)
    assert error.value.allowed == allowed
    assert f"--quant.{field}" in error.value.do


def test_a_group_that_does_not_divide_names_the_layer_and_what_fits() -> None:
    layer = "model.layers.0.self_attn.q_proj"
    with pytest.raises(ConfigError) as error:
        QuantSpec(bits=2, group_size=128).group_of(576, layer)
    assert layer in error.value.where
    assert "quant.group_size" in error.value.where
    assert "128" in error.value.given
    assert "in_features=576" in error.value.given
    assert error.value.allowed == "32, 64, -1 for this layer"
    assert "--quant.group_size" in error.value.do


def test_a_row_is_a_group_of_last_resort() -> None:
    with pytest.raises(ConfigError) as error:
        QuantSpec(group_size=32).group_of(37, "layer")
    assert error.value.allowed == "-1 for this layer"
    assert QuantSpec(group_size=-1).group_of(37, "layer") == 37
    assert QuantSpec(group_size=64).group_of(576, "layer") == 64


@pytest.mark.parametrize(
    ("bits", "group_size", "published"), [(2, 64, 2.28), (2, 128, 2.14), (3, 128, 3.15), (4, 128, 4.16)]
)
def test_bits_per_weight_are_the_published_ones(bits: int, group_size: int, published: float) -> None:
    assert round(QuantSpec(bits, group_size).bits_per_weight(4096), 2) == published


def test_bits_per_weight_without_zero_points_and_of_whole_rows() -> None:
    assert QuantSpec(2, 64, symmetric=True).bits_per_weight(4096) == 2 + 16 / 64
    assert QuantSpec(4, -1).bits_per_weight(512) == 4 + 20 / 512


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        (QuantSpec(), "w2g64"),
        (QuantSpec(3, 128), "w3g128"),
        (QuantSpec(4, 32, symmetric=True), "w4g32sym"),
        (QuantSpec(8, -1), "w8grow"),
        (QuantSpec(2, -1, symmetric=True), "w2growsym"),
    ],
)
def test_names(spec: QuantSpec, name: str) -> None:
    assert spec.name == name


def test_storage_dtypes() -> None:
    assert QuantSpec().storage_dtype is torch.bfloat16
    assert QuantSpec(scale_dtype="float16").storage_dtype is torch.float16


# ---- bits that differ -----------------------------------------------------------------------------

TABLE = {"layers.1.up": 4, "layers.0.up": 2, "layers.10.up": 3}


def test_each_linear_has_the_bits_of_the_allocation(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"average_bits": 3.3, "bits": TABLE}))
    asked = QuantSpec(8, 32, symmetric=True, allocation=tmp_path / "a.json")
    spec = asked.resolved()
    assert (
        spec
        == spec.resolved()
        == replace(spec, bits=8).resolved()
        == QuantSpec(2, 32, symmetric=True, allocation=TABLE)
    )
    assert (spec.name, spec.widths) == ("w2to4g32sym", "2 to 4")
    for name, bits in {"model.layers.0.up": 2, "layers.1.up": 4, "tower.model.layers.10.up": 3}.items():
        assert spec.of(name) == QuantSpec(bits, 32, symmetric=True)
    with pytest.raises(CheckpointError, match="no bits for it"):
        spec.of("model.layers.0.down")
    assert QuantSpec(**json.loads(json.dumps(spec.as_dict()))) == spec
    assert QuantSpec(3).of("anything") == QuantSpec(3)
    assert "allocation" not in QuantSpec(3).as_dict()  # an older version reads it, too


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "no such file"),
        ("[]", "list in place of an object"),
        ("{", "unreadable JSON"),
        ('{"layers.0.up": 2}', "null"),
        ('{"bits": {}}', "{}"),
        ('{"bits": [2]}', "[2]"),
        ('{"bits": {"layers.0.up": 5}}', "{'layers.0.up': 5}"),
        ('{"bits": {"layers.0.up": 2.5}}', "{'layers.0.up': 2.5}"),
        ('{"bits": {"layers.0.up": true}}', "{'layers.0.up': True}"),
        ('{"bits": {"layers.0.up": null}}', "{'layers.0.up': None}"),
    ],
)
def test_what_is_no_allocation_is_refused(tmp_path: Path, content: str | None, said: str) -> None:
    file = tmp_path / "a.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ConfigError) as raised:
        QuantSpec(allocation=file).resolved()
    assert_four_lines(raised.value)
    assert said in raised.value.given
    assert str(file) in raised.value.where
