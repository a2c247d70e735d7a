"""Linears that share bits, and allocations that are not of a model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from eqat_mm.blocks.source import open_model
from eqat_mm.errors import ConfigError
from eqat_mm.quant.spec import QuantSpec
from eqat_mm.train.block_ap import check_groups
from eqat_mm.train.units import units_of
from llava_adapters import arch_for
from llava_adapters.llama import ARCH
from tests.checkpoint.files import assert_four_lines
from tests.tiny_model import Tiny, mixed_bits

SPEC = QuantSpec(2, 32, allocation=mixed_bits(3))


def test_linears_of_a_stage_are_a_unit(tiny: Tiny) -> None:
    units = units_of(open_model(tiny.folder, ARCH))
    assert len(units) == 12
    assert units[4].names == tuple(f"layers.1.self_attn.{name}_proj" for name in "qkv")
    assert [len(unit.paths) for unit in units] == [3, 1, 2, 1] * 3
    assert {name for unit in units for name in unit.names} == SPEC.table.keys()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"layers.0.self_attn.k_proj": 2}, "layers.0.self_attn.k_proj 2 bits"),
        ({"layers.2.mlp.up_proj": 3}, "layers.2.mlp.up_proj 3 bits"),
        ({"layers.3.mlp.up_proj": 3}, "bits for layers.3.mlp.up_proj"),
        ({"layers.1.mlp.down_proj": None}, "no bits for layers.1.mlp.down_proj"),
    ],
)
def test_an_allocation_must_be_of_the_model(tiny: Tiny, change: dict[str, Any], said: str) -> None:
    opened = open_model(tiny.folder, ARCH)
    check_groups(opened, SPEC)
    table = {name: bits for name, bits in (SPEC.table | change).items() if bits is not None}
    with pytest.raises(ConfigError) as raised:
        check_groups(opened, replace(SPEC, allocation=table))
    assert_four_lines(raised.value)
    assert said in raised.value.given


def test_experts_have_the_same_bits(tmp_path: Path) -> None:
    arch = arch_for("mixtral")
    arch.tiny()[0].save_pretrained(tmp_path)  # type: ignore[operator]
    with pytest.raises(ConfigError, match="a model with experts"):
        units_of(open_model(tmp_path, arch))
