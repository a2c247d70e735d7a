"""config.json as every generation of readers spells it.

transformers 5 writes `rope_parameters` and `dtype`. transformers 4 and other engines look for `rope_theta`,
`rope_scaling` and `torch_dtype`, and take their defaults where they find none: another model, without an error.
"""

from __future__ import annotations

from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

_ROPE, _DTYPE = "rope_parameters", "dtype"
_OLDER = {
    _ROPE: ("rope_theta", "rope_scaling", "partial_rotary_factor", "rope_local_base_freq"),
    _DTYPE: ("torch_dtype",),
}
_ORIGIN = "_name_or_path"
_LONG = "longrope"
_OUTSIDE = ("rope_theta", "partial_rotary_factor")
"""What readers look for beside `rope_scaling`, not in it."""


def spelled_for_all(config: dict[str, Any]) -> dict[str, Any]:
    """Return the content of a config.json with its older spellings beside the new ones, in its parts, too.

    An older spelling that is there stays. The groups of a `quantization_config` name their format, which some readers
    would guess otherwise. Where on this machine a part was read from is nobody's business, and left out.
    """
    spelled = {
        name: spelled_for_all(value) if _is_part(name, value) else value
        for name, value in config.items()
        if not (name == _ORIGIN and _is_place(value))
    }
    entry = spelled.get("quantization_config")
    if entry is not None:
        groups = {name: {"format": entry["format"], **group} for name, group in entry["config_groups"].items()}
        spelled["quantization_config"] = entry | {"config_groups": groups}
    return _older(spelled) | spelled


def without_stale(config: dict[str, Any], changed: dict[str, Any]) -> dict[str, Any]:
    """Return a config with what was changed in it, and without older spellings of that."""
    stale = {older for name in changed for older in _OLDER.get(name, ())}
    return {name: value for name, value in config.items() if name not in stale} | changed


def _is_part(name: str, value: Any) -> bool:
    return isinstance(value, dict) and (name.endswith("_config") and name != "quantization_config")


def _is_place(value: Any) -> bool:
    """Say whether a name of a model is a path of one machine; published ones are relative, such as owner/model."""
    return isinstance(value, str) and (PurePosixPath(value).is_absolute() or PureWindowsPath(value).is_absolute())


def _older(config: dict[str, Any]) -> dict[str, Any]:
    rope = config.get(_ROPE) or {}
    dtype = {"torch_dtype": config[_DTYPE]} if config.get(_DTYPE) is not None else {}
    if "full_attention" in rope:  # one set for each kind of layer
        local = rope.get("sliding_attention", {}).get("rope_theta")
        return dtype | _rope(rope["full_attention"]) | ({} if local is None else {"rope_local_base_freq": local})
    return dtype | _rope(rope)


def _rope(parameters: dict[str, Any]) -> dict[str, Any]:
    """Return what older readers call the parameters of rotary embeddings."""
    kind = parameters.get("rope_type", "default")
    outside = (*_OUTSIDE, "original_max_position_embeddings") if kind == _LONG else _OUTSIDE
    found = {name: parameters[name] for name in outside if name in parameters}
    scaling = {name: value for name, value in parameters.items() if name not in outside}
    if kind == _LONG:  # Phi-3 wants three fields, in these words
        scaling = {"type": scaling.pop("rope_type")} | scaling
    return found if scaling.keys() <= {"rope_type"} and kind == "default" else found | {"rope_scaling": scaling}
