"""A model in full precision, checked and opened on the meta device; its weights are read when they are needed."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from accelerate import init_empty_weights
from torch import nn

from eqat_mm.blocks.arch import Arch
from eqat_mm.blocks.config import (
    CONFIG,
    model_on_meta,
    read_config,
    read_generation_config,
    refused,
    require_own_files,
)
from eqat_mm.blocks.door import check_stored, require_one_answer, tied_groups
from eqat_mm.blocks.names import merged_names, module_names, published_names
from eqat_mm.blocks.stored import INDEX, SINGLE, Stored, open_safetensors, weight_files
from eqat_mm.blocks.weights import WeightSource, release
from eqat_mm.runtime.files import read_json_object
from eqat_mm.runtime.progress import say

__all__ = [
    "INDEX",
    "SINGLE",
    "CheckedFolder",
    "OpenModel",
    "WeightSource",
    "check_folder",
    "empty_model",
    "module_names",
    "open_model",
    "open_safetensors",
    "release",
    "say_left_over",
    "weight_files",
]


@dataclass(frozen=True)
class OpenModel:
    """A model without weights in memory.

    Attributes:
        folder: where it was opened from.
        model: all parameters on the meta device; computed buffers (rotary tables) are real.
        arch: its architecture.
        source: its weights.
    """

    folder: Path
    model: nn.Module
    arch: Arch
    source: WeightSource

    @property
    def blocks(self) -> nn.ModuleList:
        """The decoder blocks."""
        return self.arch.find_blocks(self.model)

    def block_name(self, index: int) -> str:
        """Full path of block `index`."""
        return f"{self.arch.blocks}.{index}"


@dataclass(frozen=True)
class CheckedFolder:
    """A folder that holds a model in full precision, whole.

    Attributes:
        config: its configuration.
        source: its weights, by the names of the model.
        left_over: what is stored and has no place in the model.
    """

    config: transformers.PreTrainedConfig
    source: WeightSource
    left_over: list[Stored]


def empty_model(config: transformers.PreTrainedConfig, arch: Arch) -> transformers.PreTrainedModel:
    """Build a model whose parameters are on the meta device, float32, its experts split; computed buffers are real.

    Float32 whatever the files hold: models compute factors in the dtype they are built in, and blocks run in float32.
    """
    build = getattr(transformers, arch.auto_class).from_config
    with init_empty_weights(include_buffers=False):
        model: transformers.PreTrainedModel = build(copy.deepcopy(config), dtype=torch.float32)
    model.config.dtype = config.dtype  # what the files hold
    arch.split_experts(model)
    model.eval()
    return model


def check_folder(folder: Path, auto_class: str, arch: Arch | None = None) -> CheckedFolder:
    """Check that a folder holds a model in full precision, whole, by its configuration and the headers of its files.

    Args:
        folder: of the model.
        auto_class: class of transformers that builds the model.
        arch: by which the model will be opened; None where transformers will read it, which merges some tensors.

    Raises:
        AdapterError: experts that the adapter's stages name and that cannot be split.
        CheckpointError: a broken file, or something that `check_stored` refuses.
    """
    require_own_files(folder)
    raw = read_json_object(folder / CONFIG)
    require_one_answer(folder, raw)
    source = WeightSource(folder)
    config = read_config(folder, len(source.stored))
    read_generation_config(folder)
    model = model_on_meta(config, auto_class, folder / CONFIG)
    if arch is not None:
        arch.split_experts(model)
    source.name_by(module_names(model), published_names(model))
    source.tie(tied_groups(model))
    left_over = check_stored(source, raw, model, merged_names(model) if arch is None else lambda _: [])
    return CheckedFolder(config, source, left_over)


def say_left_over(left_over: list[Stored]) -> None:
    """Say what is stored and belongs to no place in the model."""
    if left_over:
        names = ", ".join(one.name for one in left_over[:4]) + (", ..." if len(left_over) > 4 else "")
        say(f"note: the model has no place for {len(left_over)} stored tensors, they are not used: {names}")


def open_model(folder: Path, arch: Arch) -> OpenModel:
    """Open the model in `folder` on the meta device, and check by the headers of its files that it is all there.

    Raises:
        AdapterError: the adapter's paths do not match the model.
        CheckpointError: unreadable weights, or something that `check_stored` refuses.
    """
    checked = check_folder(folder, arch.auto_class, arch)
    with refused(folder / CONFIG, "configuration"):  # it goes into checkpoints, which are JSON
        json.dumps(read_json_object(folder / CONFIG), allow_nan=False)
    say_left_over(checked.left_over)
    model = empty_model(checked.config, arch)
    arch.find_blocks(model)
    return OpenModel(folder, model, arch, checked.source)
