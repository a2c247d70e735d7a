"""The `quantization_config` of compressed-tensors' `pack-quantized` format, as pure functions.

What is in the files for each quantized linear is the state dict of `PackedLinear`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from eqat_mm.blocks.arch import Arch
from eqat_mm.errors import CheckpointError
from eqat_mm.quant.spec import QuantSpec

PACKED_SUFFIX = ".weight_packed"
SCALE_SUFFIX = ".weight_scale"
FORMAT = "pack-quantized"


def quantization_config(spec: QuantSpec, ignore: Sequence[str]) -> dict[str, Any]:
    """Return the `quantization_config` entry of config.json.

    Args:
        spec: of every quantized linear.
        ignore: regular expressions (`re:...`) of linears that stay in full precision.
    """
    whole_row = spec.group_size == -1
    weights = {
        "num_bits": spec.bits,
        "type": "int",
        "symmetric": spec.symmetric,
        "strategy": "channel" if whole_row else "group",
        "group_size": None if whole_row else spec.group_size,
        "dynamic": False,
        "actorder": None,
        "observer": "minmax",
    }
    return {
        "quant_method": "compressed-tensors",
        "format": FORMAT,
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": weights,
                "input_activations": None,
                "output_activations": None,
            }
        },
        "ignore": list(ignore),
        "kv_cache_scheme": None,
        # transformers 5.23 expects unpacked zero points unless it is told to dequantize while it loads; engines ignore
        # the key. That route rounds weights to the dtype of the scales, so the symmetric grid does without.
        **({} if spec.symmetric else {"dequantize": True}),
    }


def ignored_linears(arch: Arch, model: nn.Module) -> list[str]:
    """Return regular expressions for the full-precision parts that contain linears.

    They match by the end of the path, because serving engines change the prefix. Linears inside the blocks that the
    adapter does not list are among them.
    """
    parts = [
        f"re:.*{path}$"
        for path, module in arch.find(model, f"{arch.blocks}.0").named_modules()
        if isinstance(module, nn.Linear) and path not in arch.linears
    ]
    for part in arch.full_precision_parts(model):
        if part.whole and any(isinstance(module, nn.Linear) for module in part.module.modules()):
            parts.append(f"re:.*{part.path.rpartition('.')[2]}.*")
    return parts


def spec_of_config(config: dict[str, Any], scale_dtype: torch.dtype, where: str) -> QuantSpec:
    """Return the spec that a `quantization_config` describes.

    Raises:
        CheckpointError: not `pack-quantized`, or integer settings that this package does not store.
    """
    entry = config.get("quantization_config")
    groups = list((entry or {}).get("config_groups", {}).values())
    if entry is None or entry.get("format") != FORMAT or len(groups) != 1:
        raise CheckpointError(
            where=where,
            given="no quantization_config"
            if entry is None
            else f"format {entry.get('format')!r}, {len(groups)} groups",
            allowed=f"compressed-tensors {FORMAT!r} with one group",
            do="give a folder written by `eqat block-ap` or `eqat e2e-qp`",
        )
    weights = groups[0]["weights"]
    return QuantSpec(
        bits=weights["num_bits"],
        group_size=weights["group_size"] or -1,
        symmetric=weights["symmetric"],
        scale_dtype="float16" if scale_dtype is torch.float16 else "bfloat16",
    )
