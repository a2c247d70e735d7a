"""Bits and bytes from headers against the files, and against what is said elsewhere."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from eqat_mm.blocks.weights import WeightSource
from eqat_mm.commands.evaluate import bits_per_weight as said_by_eval
from eqat_mm.report.storage import PARTS, QUANTIZED, bits_per_weight, layers_of


@pytest.mark.parametrize("name", ["rtn", "block-ap", "e2e-qp"])
def test_bits_are_those_that_eval_says(root: Path, name: str) -> None:
    folder = root / name / "model"
    assert bits_per_weight(folder, layers_of(folder)) == pytest.approx(said_by_eval(folder))


def test_every_byte_belongs_to_one_layer(root: Path) -> None:
    source = WeightSource(root / "rtn" / "model")
    expected = sum(source.read(name).nbytes for name in source.names() if not name.endswith("weight_shape"))
    layers = layers_of(root / "rtn" / "model")
    assert sum(layer.bytes for layer in layers) == expected
    assert [layer.bytes for layer in layers] == sorted((layer.bytes for layer in layers), reverse=True)


def test_layers_say_how_many_and_how_large_they_are(root: Path) -> None:
    layers = {layer.name: layer for layer in layers_of(root / "rtn" / "model")}
    up, embedding = layers["mlp.up_proj"], layers["model.embed_tokens"]
    assert (up.form, up.count, up.weights) == (QUANTIZED, 2, 2 * 64 * 128)
    assert up.stored[PARTS.index("codes")] == 2 * 64 * 128 * 2 // 8
    assert up.stored[PARTS.index("not quantized")] == 0
    assert (embedding.form, embedding.bits_per_weight) == ("F32", 32)
    assert layers["input_layernorm"].count == 2


def test_a_vision_tower_is_one_layer(tmp_path: Path) -> None:
    names = [f"model.vision_tower.layers.{index}.mlp.fc1.{leaf}" for index in range(3) for leaf in ("weight", "bias")]
    save_file({name: torch.zeros(4, dtype=torch.bfloat16) for name in names}, tmp_path / "model.safetensors")
    (tower,) = layers_of(tmp_path)
    assert (tower.name, tower.bytes, tower.weights) == ("model.vision_tower", 48, 24)
    assert bits_per_weight(tmp_path, [tower]) is None
