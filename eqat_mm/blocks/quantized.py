"""Is a model quantized already? By what config.json says, and by what the files hold."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from eqat_mm.blocks.stored import Stored
from eqat_mm.errors import CheckpointError

_PLAIN = ("F16", "BF16", "F32", "F64")
"""Dtypes of weights that nothing has quantized."""

_UNDONE = ("initialized", "calibration", "frozen", "decompressed")
"""States of compressed-tensors in which the files hold plain weights."""

_METHODS = {
    "GPTQ or AWQ": r"qweight|qzeros|scales|g_idx",
    "bitsandbytes": r"absmax|quant_map|nested_\w+|quant_state\w*|bitsandbytes__\w+|SCB|weight_format",
    "fp8": r"\w*scale_inv|weight_scale_2|scale_weight",
    "compressed-tensors": r"(weight|input|output|[qkv])_\w*",
}
"""Method -> how it calls what it stores beside a weight."""

_COMPANION = re.compile(r"\S+[._](scales?|scale_inv|zeros|zero_points?|packed|absmax|g_idx|qweight|qzeros|SCB)")


def refuse_quantized(
    folder: Path,
    config: dict[str, Any],
    placed: Iterable[tuple[Stored, Tensor]],
    left_over: Mapping[str, Stored],
    known: Mapping[str, Tensor],
) -> None:
    """Check that a folder holds weights in full precision.

    A dense folder whose compressed-tensors entry says that it was decompressed is one.

    Args:
        folder: of the model.
        config: its config.json.
        placed: what is stored of the model, with its place in it.
        left_over: what is stored beyond the model, by the name it would have there.
        known: tensors of the model by name.

    Raises:
        CheckpointError: it is quantized already.
    """
    named = _named_method(config)
    traces = [one for name, one in left_over.items() if _is_companion(name, known)]
    traces += [one for one, place in placed if place.is_floating_point() and one.dtype not in _PLAIN]
    if traces:
        method = named or _method_of(traces[0])
        raise _quantized(folder, method, f"{traces[0].name} of {traces[0].dtype} in {traces[0].path.name}")
    refuse_named_quantized(folder, config)


def refuse_named_quantized(folder: Path, config: dict[str, Any]) -> None:
    """Check that a model is in full precision by what its config.json says.

    Raises:
        CheckpointError: it is quantized already.
    """
    named = _named_method(config)
    if named is not None and not _is_undone(config):
        raise _quantized(folder, named, "quantization_config in config.json")


def _quantized(folder: Path, method: str, evidence: str) -> CheckpointError:
    return CheckpointError(
        where=str(folder),
        given=f"a model that is quantized already, by {method} ({evidence})",
        allowed="a full-precision model: weights in floating point of 16 or 32 bits",
        do="name the unquantized repository that it was made from; a checkpoint of eqat-mm lacks its eqat.json here",
    )


def _is_companion(name: str, known: Mapping[str, Tensor]) -> bool:
    """Whether a tensor that the model lacks stands beside a weight of it, as step sizes and packed words do."""
    module, _, leaf = name.rpartition(".")
    beside = f"{module}.weight" in known or module in known or re.sub(r"_(blocks|scales)$", "", name) in known
    return (beside and not leaf.endswith("bias")) or _COMPANION.fullmatch(name) is not None


def _method_of(one: Stored) -> str:
    leaf = one.name.rpartition(".")[2]
    named = (method for method, pattern in _METHODS.items() if re.fullmatch(pattern, leaf))
    return next(named, "an unknown method")


def _entries(config: dict[str, Any]) -> list[Any]:
    """Return what a config.json says about quantization, of the whole model or of a tower."""
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]
    keys = ("quantization_config", "compression_config")
    return [part[key] for part in parts for key in keys if part.get(key) is not None]


def _named_method(config: dict[str, Any]) -> str | None:
    entries = _entries(config)
    if not entries:
        return None
    method = entries[0].get("quant_method") if isinstance(entries[0], dict) else None
    return str(method or "a method without a name")[:80]


def _is_undone(config: dict[str, Any]) -> bool:
    return all(
        isinstance(entry, dict)
        and entry.get("quant_method") == "compressed-tensors"
        and entry.get("quantization_status") in _UNDONE
        for entry in _entries(config)
    )
