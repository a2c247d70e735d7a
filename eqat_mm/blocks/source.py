"""A model in full precision, checked and opened on the meta device; its weights are read when they are needed."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from accelerate import init_empty_weights
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

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
    """Build a model whose parameters are on the meta device, float32; computed buffers are real.

    Float32 whatever the files hold: models compute factors in the dtype they are built in, and blocks run in float32.
    """
    build = getattr(transformers, arch.auto_class).from_config
    with init_empty_weights(include_buffers=False):
        model: transformers.PreTrainedModel = build(config, dtype=torch.float32)
    model.eval()
    return model


def module_names(model: transformers.PreTrainedModel) -> Callable[[str], str]:
    """Return the function from the name of a tensor in published files to its name in `model`.

    The names of modules change between releases of transformers, those in the files do not. The renaming is the
    library's own, the one of `from_pretrained`; tensors that it merges while loading keep their names.
    """
    renamings = [rule for rule in get_model_conversion_mapping(model) if isinstance(rule, WeightRenaming)]
    known = model.state_dict()

    def rename(stored: str) -> str:
        name, _ = rename_source_key(stored, renamings, [], model.base_model_prefix, known)
        if name not in known and stored in known:  # it has the name of a module already
            name, _ = rename_source_key(stored, [], [], model.base_model_prefix, known)
        return name

    return rename


def merged_names(model: transformers.PreTrainedModel) -> Callable[[str], list[str]]:
    """Return the function from the name of a tensor in published files to those that transformers makes of it.

    None of a tensor that is read as it is stored.
    """
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    known = model.state_dict()

    def made_of(stored: str) -> list[str]:
        name, pattern = rename_source_key(stored, renamings, converters, model.base_model_prefix, known)
        if pattern is None or name not in known:
            return []
        targets = by_pattern[pattern].target_patterns
        return [name.replace(targets[0], target) for target in targets]

    return made_of


def check_folder(folder: Path, auto_class: str, *, merges: bool = False) -> CheckedFolder:
    """Check that a folder holds a model in full precision, whole, by its configuration and the headers of its files.

    Args:
        folder: of the model.
        auto_class: class of transformers that builds the model.
        merges: the model will be read by transformers, which makes some tensors of others.

    Raises:
        CheckpointError: a broken file, or something that `check_stored` refuses.
    """
    require_own_files(folder)
    raw = read_json_object(folder / CONFIG)
    require_one_answer(folder, raw)
    source = WeightSource(folder)
    config = read_config(folder, len(source.stored))
    read_generation_config(folder)
    model = model_on_meta(config, auto_class, folder / CONFIG)
    source.name_by(module_names(model))
    source.tie(tied_groups(model))
    left_over = check_stored(source, raw, model, merged_names(model) if merges else lambda _: [])
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
    checked = check_folder(folder, arch.auto_class)
    with refused(folder / CONFIG, "configuration"):  # it goes into checkpoints, which are JSON
        json.dumps(read_json_object(folder / CONFIG), allow_nan=False)
    say_left_over(checked.left_over)
    model = empty_model(checked.config, arch)
    arch.find_blocks(model)
    return OpenModel(folder, model, arch, checked.source)
