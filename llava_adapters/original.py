"""LLaVA in the layout of its first release, which transformers does not read: refused, with the converted repository.

There the language model is the model itself, with the projector as `mm_projector` inside and the vision tower by name.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from eqat_mm.errors import AdapterError

OWNER = "liuhaotian"

CONVERTED = {
    "llava-v1.5-7b": "llava-hf/llava-1.5-7b-hf",
    "llava-v1.5-13b": "llava-hf/llava-1.5-13b-hf",
    "llava-v1.6-mistral-7b": "llava-hf/llava-v1.6-mistral-7b-hf",
    "llava-v1.6-vicuna-7b": "llava-hf/llava-v1.6-vicuna-7b-hf",
    "llava-v1.6-vicuna-13b": "llava-hf/llava-v1.6-vicuna-13b-hf",
    "llava-v1.6-34b": "llava-hf/llava-v1.6-34b-hf",
}
"""Original name -> the same weights in the layout of transformers."""

_MODEL_TYPES = ("llava_llama", "llava_mistral", "llava_mpt", "llava_qwen")


def refuse_original_repository(model: str) -> None:
    """Refuse a hub repository in the original layout, before anything is downloaded.

    Raises:
        AdapterError: it is one.
    """
    owner, _, name = model.partition("/")
    if owner == OWNER:
        raise _refusal(f"--model {model}", f"a repository of {OWNER}", name)


def refuse_original_folder(folder: Path, config: dict[str, Any]) -> None:
    """Refuse a folder in the original layout; `config` is its config.json.

    Raises:
        AdapterError: it is one.
    """
    model_type = config.get("model_type")
    if model_type in _MODEL_TYPES or "mm_vision_tower" in config:
        names = (folder.name, Path(str(config.get("_name_or_path"))).name)
        name = next((name for name in names if name.lower() in CONVERTED), folder.name)
        raise _refusal(str(folder / "config.json"), f"model_type {model_type!r} with mm_* settings", name)


def _refusal(where: str, given: str, name: str) -> AdapterError:
    converted = CONVERTED.get(name.lower())
    return AdapterError(
        where=where,
        given=f"{given}: LLaVA in the layout of its first release",
        allowed="LLaVA in the layout of transformers (model_type llava or llava_next)",
        do=f"use --model {converted}, the same weights converted"
        if converted
        else f"use the converted model; llava-hf has {', '.join(CONVERTED.values())}",
    )
