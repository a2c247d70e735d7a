"""VipLLaVA: as LLaVA-1.5, with a projector that reads several layers of the vision tower."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from llava_adapters.llava import ARCH as LLAVA
from llava_adapters.tiny import tiny_vision_config
from llava_adapters.tiny_processor import tiny_processor
from llava_adapters.tiny_vlm import text_config, tiny_vlm


def tiny() -> Any:
    """Return a tiny model and its batches."""
    fields: dict[str, Any] = {"image_token_index": 96, "vision_feature_layer": [-1, -2], "image_seq_length": 4}
    vision = tiny_vision_config().to_dict()
    return tiny_vlm("vipllava", tiny_processor(), text=text_config("llama"), vision=vision, **fields)


ARCH = replace(LLAVA, name="vipllava", model_types=("vipllava",), tiny=tiny)
"""The declaration; see docs/adding_a_model.md."""
