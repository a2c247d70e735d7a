"""LLaVA's vision tower and projector as llama.cpp's second file, `mmproj`: what it holds, and what is refused.

Numbers keep their dtype. Layers of the tower behind the one whose output is used are left out, and so is its last norm.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from eqat_mm.checkpoint.folders import load_processor
from eqat_mm.errors import ExportError
from eqat_mm.export.gguf.file import BF16, F16, F32, Planned, plain
from eqat_mm.export.gguf.names import of_vision
from eqat_mm.export.opened import PackedModel

_WHOLE = {
    "embeddings.class_embedding": "v.class_embd",
    "embeddings.patch_embedding.weight": "v.patch_embd.weight",
    "embeddings.position_embedding.weight": "v.position_embd.weight",
    "pre_layrnorm": "v.pre_ln",
    "linear_1": "mm.0",
    "linear_2": "mm.2",
}
_IN_LAYER = {
    "layer_norm1": "ln1",
    "layer_norm2": "ln2",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.out_proj": "attn_out",
    "mlp.fc1": "ffn_up",
    "mlp.fc2": "ffn_down",
}
_LAYER = re.compile(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)")
_INSIDE = re.compile(r".*(?:vision_tower|multi_modal_projector)\.(?:vision_model\.)?")
_KINDS = {"F16": F16, "BF16": BF16}


def sees(model: PackedModel) -> bool:
    """Whether a model has a vision tower."""
    return any(of_vision(name) for name in model.others)


def require_vision(model: PackedModel) -> None:
    """Check that llama.cpp has the vision tower and the projector of a model.

    Raises:
        ExportError: it has not.
        CheckpointError: the model has no image processor.
    """
    config = model.config
    tower = config.get("vision_config", {})
    wanted: dict[str, tuple[Any, tuple[Any, ...]]] = {
        "model_type": (config.get("model_type"), ("llava",)),
        "vision_config.model_type": (tower.get("model_type"), ("clip_vision_model",)),
        "vision_config.hidden_act": (tower.get("hidden_act", "quick_gelu"), ("quick_gelu", "gelu")),
        "projector_hidden_act": (config.get("projector_hidden_act", "gelu"), ("gelu",)),
        "vision_feature_select_strategy": (config.get("vision_feature_select_strategy", "default"), ("default",)),
        "vision_feature_layer": (type(config.get("vision_feature_layer", -2)).__name__, ("int",)),
        "multimodal_projector_bias": (config.get("multimodal_projector_bias", True), (True,)),
    }
    for name, (given, allowed) in wanted.items():
        if given not in allowed:
            raise ExportError(
                where=f"--to gguf, from {model.folder}: {name}",
                given=repr(given),
                allowed=f"{' or '.join(map(repr, allowed))}, as LLaVA-1.5 has it",
                do="serve the checkpoint itself (docs/formats.md), or choose another --to",
            )
    if tower.get("intermediate_size") == tower.get("hidden_size"):
        raise ExportError(
            where=f"--to gguf, from {model.folder}: vision_config",
            given=f"intermediate_size {tower.get('intermediate_size')}, which is hidden_size, too",
            allowed="two sizes, by which llama.cpp tells the two halves of an MLP apart",
            do="serve the checkpoint itself (docs/formats.md), or choose another --to",
        )
    load_processor(model.folder)


def layers_used(model: PackedModel) -> int:
    """Return how many layers of the tower come before the features."""
    layer = int(model.config.get("vision_feature_layer", -2))
    return layer if layer >= 0 else vision_config(model).num_hidden_layers + layer + 1


def vision_config(model: PackedModel) -> Any:
    """Return the configuration of the tower, as transformers reads it."""
    return model.full_config.vision_config


def vision_keys(model: PackedModel) -> dict[str, Any]:
    """Return key -> value of the file."""
    config, images = vision_config(model), load_processor(model.folder).image_processor
    keys = {
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "projection_dim": config.projection_dim,
        "attention.head_count": config.num_attention_heads,
        "attention.layer_norm_epsilon": float(config.layer_norm_eps),
        "block_count": layers_used(model),
        "feature_layer": [layers_used(model)],
        "image_mean": [float(value) for value in images.image_mean],
        "image_std": [float(value) for value in images.image_std],
    }
    return {
        "general.type": "mmproj",
        "general.name": f"{Path(model.manifest.source).name} vision tower and projector",
        "general.quantized_by": "eqat-mm",
        "clip.has_vision_encoder": True,
        "clip.has_llava_projector": True,
        "clip.projector_type": "mlp",
        "clip.use_gelu": config.hidden_act == "gelu",
    } | {f"clip.vision.{key}": value for key, value in keys.items()}


def vision_tensors(model: PackedModel) -> list[Planned]:
    """Return the tensors of the file."""
    found = []
    for name in filter(of_vision, model.others):
        own = vision_name(name, layers_used(model))
        if own is not None:
            stored = model.source.by_name[name][0]
            kind = _KINDS.get(stored.dtype, F32) if len(stored.shape) == 2 else F32
            found.append(plain(own, stored.shape, kind, lambda name=name: model.source.read(name)))  # type: ignore[misc]
    return found


def vision_name(name: str, layers: int) -> str | None:
    """Return what the file calls a tensor of tower or projector; None of one that is not used.

    Args:
        name: in the model.
        layers: of the tower that are used.
    """
    inside = _INSIDE.sub("", name)
    in_layer = _LAYER.fullmatch(inside)
    if in_layer is not None:
        number, module, leaf = in_layer.groups()
        return f"v.blk.{number}.{_IN_LAYER[module]}.{leaf}" if int(number) < layers else None
    module, _, leaf = inside.rpartition(".")
    return _WHOLE.get(inside) or (f"{_WHOLE[module]}.{leaf}" if module in _WHOLE else None)
