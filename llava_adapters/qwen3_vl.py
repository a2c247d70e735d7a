"""Qwen3-VL: as Qwen2.5-VL, with features of inner vision layers added between the first blocks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import transformers

from llava_adapters.qwen2_5_vl import ARCH as QWEN2_5_VL
from llava_adapters.qwen2_5_vl import IDS, IMAGE, processor_of
from llava_adapters.tiny_vlm import text_config, tiny_vlm


def processor() -> Any:
    """Return a processor for the tiny model: patches of 4 x 4 pixels, four of them to a token."""
    return processor_of(transformers.Qwen3VLProcessor, transformers.Qwen3VLVideoProcessor)


def tiny() -> Any:
    """Return a tiny model, whose first vision layer is seen by the blocks, too, and its batches."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 2,
        "patch_size": 4,
        "out_hidden_size": 64,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0],
    }
    text = text_config("qwen3_vl_text", rope_parameters=rope, head_dim=16)
    return tiny_vlm("qwen3_vl", processor(), text=text, vision=vision, image=IMAGE, **IDS)


ARCH = replace(QWEN2_5_VL, name="qwen3_vl", model_types=("qwen3_vl",), tiny=tiny, processor=processor)
"""The declaration; see docs/adding_a_model.md."""
