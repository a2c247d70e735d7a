"""The empty packed model of a checkpoint, built as its source was: by the same transformers class, from config.json."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from torch import nn
from transformers import PreTrainedModel

from eqat_mm.blocks.arch import set_submodule
from eqat_mm.blocks.config import CONFIG, read_config, read_generation_config, refused
from eqat_mm.blocks.names import split_as_stored
from eqat_mm.checkpoint.layout import SCALE_SUFFIX, described
from eqat_mm.checkpoint.manifest import MANIFEST, Manifest
from eqat_mm.checkpoint.verify import weight_map
from eqat_mm.errors import CheckpointError
from eqat_mm.quant.bit_widths import UNQUANTIZED
from eqat_mm.quant.dynamic_linear import DynamicPackedLinear
from eqat_mm.quant.packed_linear import PackedLinear
from eqat_mm.quant.spec import QuantSpec


def skeleton(folder: Path, manifest: Manifest) -> PreTrainedModel:
    """Return the model of config.json with all parameters on the meta device; experts are split where files hold each.

    Raises:
        CheckpointError: transformers builds none, or config.json has more layers than tensors are stored.
    """
    stored = weight_map(folder)
    config = read_config(folder, len(stored))
    vision = type(config) in transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    mapped = "AutoModelForImageTextToText" if vision else "AutoModelForCausalLM"
    with refused(folder / CONFIG, "configuration"), init_empty_weights(include_buffers=False):
        auto = getattr(transformers, manifest.auto_class or mapped)
        model: PreTrainedModel = auto.from_config(config, dtype=torch.float32)
    packed = (name.removesuffix(SCALE_SUFFIX) for name in stored if name.endswith(SCALE_SUFFIX))
    split_as_stored(model, (f"{path}.weight" for path in packed))
    model.generation_config = read_generation_config(folder) or model.generation_config
    return model


def require_described(folder: Path, raw: dict[str, Any], manifest: Manifest, scale_dtype: torch.dtype | None) -> None:
    """Check that config.json and manifest describe one quantization.

    Raises:
        CheckpointError: they do not, or config.json describes none.
    """
    given = described(raw, scale_dtype, f"{folder / CONFIG}: quantization_config")
    recorded = (QuantSpec(**manifest.spec), manifest.widths)
    if given != recorded:
        raise CheckpointError(
            where=f"{folder / CONFIG}: quantization_config",
            given=" ".join(part.name for part in given),
            allowed=f"{' '.join(part.name for part in recorded)}, as recorded in {MANIFEST}",
            do="the file was altered: copy or make the checkpoint again",
        )


def insert_packed(model: nn.Module, scales: Iterable[str], manifest: Manifest, where: str) -> None:
    """Replace the linears that have step sizes by empty packed ones.

    Raises:
        CheckpointError: a name is not that of a linear, or one that has no bits, or the group size does not divide one.
    """
    linears = {path: module for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    spec = QuantSpec(**manifest.spec)
    for path in (name.removesuffix(SCALE_SUFFIX) for name in scales):
        inputs = linears[path].in_features if path in linears else 0
        if not inputs or inputs % max(1, spec.group_size):
            raise CheckpointError(
                where=where,
                given=f"step sizes of {path}, {f'with {inputs} inputs' if inputs else 'no linear of the model'}",
                allowed=f"linears of the model that config.json describes, in groups as {spec.name} has them",
                do="copy or make the checkpoint again",
            )
        set_submodule(model, path, empty_packed(linears[path], spec.of(path), manifest.activation_bits, path))


def empty_packed(linear: nn.Linear, spec: QuantSpec, activation_bits: int, path: str) -> PackedLinear:
    """Return the packed linear, on the meta device, that stands in for `linear`, which is called `path`."""
    bias = linear.bias is not None
    with torch.device("meta"):
        if activation_bits == UNQUANTIZED:
            return PackedLinear(linear.in_features, linear.out_features, spec, bias=bias, layer=path)
        return DynamicPackedLinear(
            linear.in_features, linear.out_features, spec, activation_bits=activation_bits, bias=bias, layer=path
        )
