"""GGUF's keys for the sizes of a language model, its rotary positions and its norms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from eqat_mm.errors import ExportError
from eqat_mm.export.opened import PackedModel


@dataclass(frozen=True)
class Family:
    """An architecture of llama.cpp.

    Attributes:
        name: of it.
        turned: query and key have the rows of each head interleaved.
    """

    name: str
    turned: bool


FAMILIES = {
    "llama": Family("llama", turned=True),
    "mistral": Family("llama", turned=True),
    "qwen2": Family("qwen2", turned=False),
    "qwen3": Family("qwen3", turned=False),
}
"""`model_type` of a language model -> architecture of llama.cpp."""

_ROPE = ("default", "linear", "llama3", "yarn")


def family_of(model: PackedModel) -> Family:
    """Return the architecture that llama.cpp has for a model.

    Raises:
        ExportError: it has none, or this package does not write it.
    """
    kind = str(model.text_config.model_type)
    if kind not in FAMILIES:
        raise ExportError(
            where=f"--to gguf, from {model.folder}",
            given=f"a language model of type {kind!r}",
            allowed=", ".join(FAMILIES),
            do="serve the checkpoint itself (docs/formats.md), or choose another --to",
        )
    return FAMILIES[kind]


def require_rope(model: PackedModel) -> None:
    """Check that llama.cpp has the rotary positions of a model.

    Raises:
        ExportError: it does not.
    """
    rope = rope_of(model.text_config)
    kind, part = rope.get("rope_type", "default"), rope.get("partial_rotary_factor", 1.0)
    if kind not in _ROPE or part != 1.0:
        raise ExportError(
            where=f"--to gguf, from {model.folder}: rope_parameters",
            given=f"rope_type {kind!r}" if part == 1.0 else f"partial_rotary_factor {part}",
            allowed=f"rope_type {', '.join(_ROPE)}, on whole heads",
            do="serve the checkpoint itself (docs/formats.md), or choose another --to",
        )


def rope_of(config: Any) -> dict[str, Any]:
    """Return the rotary settings of a language model's configuration."""
    return dict(getattr(config, "rope_parameters", None) or {})


def head_dim(config: Any) -> int:
    """Return the channels of one head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def size_keys(config: Any, family: Family) -> dict[str, Any]:
    """Return key -> value for sizes and norms; whole numbers are unsigned, others single precision."""
    width = head_dim(config)
    heads = {"": config.num_attention_heads, "_kv": config.num_key_value_heads}
    keys: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        **{f"attention.head_count{which}": count for which, count in heads.items()},
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.dimension_count": width,
        "rope.freq_base": float(rope_of(config).get("rope_theta", 10000.0)),
    }
    if width * config.num_attention_heads != config.hidden_size:
        keys |= {"attention.key_length": width, "attention.value_length": width}
    return {f"{family.name}.{key}": value for key, value in (keys | _scaling(rope_of(config))).items()}


def _scaling(rope: dict[str, Any]) -> dict[str, Any]:
    kind = rope.get("rope_type", "default")
    if kind not in ("linear", "yarn"):
        return {}
    keys = {"rope.scaling.type": kind, "rope.scaling.factor": float(rope["factor"])}
    original = rope.get("original_max_position_embeddings")
    return keys | ({"rope.scaling.original_context_length": original} if kind == "yarn" and original else {})


def rope_factors(config: Any) -> Tensor | None:
    """Return by what the frequencies of Llama 3's positions are divided, float32 [head_dim / 2]; None elsewhere."""
    rope = rope_of(config)
    if rope.get("rope_type") != "llama3":
        return None
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 1.0 / rope["rope_theta"] ** (torch.arange(0, head_dim(config), 2, dtype=torch.float32) / head_dim(config))
    factors: Tensor = (plain / scaled).to(torch.float32)
    return factors
