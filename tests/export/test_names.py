"""Names of tensors in GGUF, and the order of rows that goes with its rotation of neighbours."""

from __future__ import annotations

import torch

from eqat_mm.export.gguf.names import gguf_name, of_vision, row_order


def test_names() -> None:
    assert gguf_name("model.layers.12.mlp.gate_proj.weight") == "blk.12.ffn_gate.weight"
    assert gguf_name("model.language_model.layers.0.self_attn.q_proj.bias") == "blk.0.attn_q.bias"
    assert gguf_name("model.embed_tokens.weight") == "token_embd.weight"
    assert gguf_name("lm_head.weight") == "output.weight"
    assert gguf_name("model.layers.0.mlp.experts.gate_up_proj") is None
    assert of_vision("model.vision_tower.pre_layrnorm.weight")
    assert not of_vision("model.layers.0.mlp.up_proj.weight")


def test_rows_give_neighbours_what_halves_had() -> None:
    """Scores of rotated queries and keys are the same, both rotated by halves or both by neighbours."""
    heads, width = 3, 8
    order = row_order("model.layers.0.self_attn.q_proj", heads * width, width)
    assert order is not None
    angles = torch.rand(width // 2)
    vector = torch.randn(heads, width)
    first, second = vector.chunk(2, -1)
    cos, sin = angles.cos(), angles.sin()
    by_halves = torch.cat([first * cos - second * sin, second * cos + first * sin], 1)
    even, odd = vector.flatten()[order].view(heads, -1, 2).unbind(-1)
    turned = torch.stack([even * cos - odd * sin, odd * cos + even * sin], -1)
    assert torch.equal(turned.flatten(), by_halves.flatten()[order])


def test_other_rows_stay() -> None:
    assert row_order("model.layers.0.self_attn.v_proj.weight", 16, 8) is None
    assert row_order("model.layers.0.self_attn.q_norm.weight", 8, 8) is None
