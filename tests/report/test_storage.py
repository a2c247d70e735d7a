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


@pytest.mark.parametrize(
    ("module", "part"),
    [
        ("model.vision_tower.layers.3.mlp.fc1", "model.vision_tower"),
        ("vision_tower.vision_model.encoder.layers.3.mlp.fc1", "vision_tower"),
        ("model.multi_modal_projector.linear_1", "model.multi_modal_projector"),
        ("language_model.model.embed_tokens", "language_model.model.embed_tokens"),
        ("language_model.model.layers.11.input_layernorm", "input_layernorm"),
        ("lm_head", "lm_head"),
    ],
)
def test_what_is_not_quantized_is_told_apart_by_its_part(module: str, part: str, tmp_path: Path) -> None:
    tensors = {f"{module}.{leaf}": torch.zeros(4, dtype=torch.bfloat16) for leaf in ("weight", "bias")}
    save_file(tensors, tmp_path / "model.safetensors")
    (found,) = layers_of(tmp_path)
    assert (found.name, found.form, found.bytes, found.weights) == (part, "BF16", 16, 8)
    assert bits_per_weight(tmp_path, [found]) is None
