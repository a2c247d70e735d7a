"""A model opened on the meta device and its weights read from safetensors when they are needed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key

from eqat_mm.blocks.arch import Arch
from eqat_mm.errors import CheckpointError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


class WeightSource:
    """Tensors of a Hugging Face model folder by name, read one at a time.

    Args:
        folder: holds `model.safetensors`, or shards and `model.safetensors.index.json`.
        rename: from a name in the files to the name by which the tensor is asked for; see `module_names`.
        files: some files of the folder, where it is not complete yet; None takes all that its index names.

    Raises:
        CheckpointError: no weights, a missing shard, or a file that is not safetensors (truncated, altered).
    """

    def __init__(self, folder: Path, rename: Callable[[str], str] = str, files: Iterable[Path] | None = None) -> None:
        self.folder = folder
        self._where: dict[str, tuple[Path, str]] = {}
        for path in weight_files(folder) if files is None else files:
            for stored in self.names_of(path):
                self._where[rename(stored)] = (path, stored)

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def names(self) -> list[str]:
        """All tensor names."""
        return list(self._where)

    def stored_name(self, name: str) -> str:
        """Return what the files call a tensor; one that they lack is named like the weight of its module."""
        if name in self._where:
            return self._where[name][1]
        module, _, leaf = name.rpartition(".")
        return self._where[f"{module}.weight"][1].removesuffix("weight") + leaf

    def read(self, name: str) -> Tensor:
        """Return one tensor in its stored dtype, backed by the file.

        The file is mapped for this tensor alone, so its pages go when the tensor goes.

        Raises:
            CheckpointError: no tensor of that name.
        """
        if name not in self._where:
            raise CheckpointError(
                where=str(self.folder),
                given=f"no tensor {name}",
                allowed="a checkpoint with every weight of the model",
                do="download or convert the model again",
            )
        path, stored = self._where[name]
        with open_safetensors(path) as reader:
            tensor: Tensor = reader.get_tensor(stored)
        return tensor

    @staticmethod
    def names_of(path: Path) -> list[str]:
        """Return the tensor names in one safetensors file."""
        with open_safetensors(path) as reader:
            return list(reader.keys())

    def materialise(
        self,
        module: nn.Module,
        prefix: str,
        dtype: torch.dtype,
        device: torch.device,
        *,
        recurse: bool = True,
    ) -> None:
        """Replace every meta parameter and buffer of `module` by the stored tensor `prefix + name`.

        Args:
            module: its tensors on the meta device are replaced.
            prefix: of its names in the model, with the dot.
            dtype: to cast floating-point tensors to.
            device: to put them on.
            recurse: include submodules.

        Raises:
            CheckpointError: a tensor is not stored.
        """
        tensors = [*module.named_parameters(recurse=recurse), *module.named_buffers(recurse=recurse)]
        for name, tensor in tensors:
            if tensor.is_meta:
                value = self.read(prefix + name).to(device)
                value = value.to(dtype) if value.is_floating_point() else value
                _assign(module, name, value, is_parameter=isinstance(tensor, nn.Parameter))


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


def empty_model(config: transformers.PreTrainedConfig, arch: Arch) -> transformers.PreTrainedModel:
    """Build a model whose parameters are on the meta device; computed buffers are real."""
    with init_empty_weights(include_buffers=False):
        model: transformers.PreTrainedModel = getattr(transformers, arch.auto_class).from_config(config)
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
        return name

    return rename


def open_model(folder: Path, arch: Arch) -> OpenModel:
    """Open the model in `folder` on the meta device.

    Raises:
        AdapterError: the adapter's paths do not match the model.
        CheckpointError: unreadable weights.
    """
    model = empty_model(transformers.AutoConfig.from_pretrained(folder), arch)
    arch.find_blocks(model)
    return OpenModel(folder, model, arch, WeightSource(folder, module_names(model)))


def release(module: nn.Module, *, recurse: bool = True) -> None:
    """Put the parameters of `module` back on the meta device; computed buffers stay."""
    for name, parameter in list(module.named_parameters(recurse=recurse)):
        _assign(module, name, parameter.detach().to("meta"), is_parameter=True)


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a model folder, in order.

    Raises:
        CheckpointError: there are none, or the index names a file that is missing.
    """
    if (folder / INDEX).is_file():
        names = sorted(set(json.loads((folder / INDEX).read_text())["weight_map"].values()))
        paths = [folder / name for name in names]
    else:
        paths = [folder / SINGLE]
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise CheckpointError(
            where=str(folder),
            given=f"missing {', '.join(missing[:3])}",
            allowed=f"a model folder with {SINGLE}, or {INDEX} and every shard it names",
            do="check the path, or make the checkpoint again",
        )
    return paths


def open_safetensors(path: Path) -> Any:
    """Open a safetensors file.

    Raises:
        CheckpointError: the file is truncated or not safetensors.
    """
    try:
        return safe_open(str(path), framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            where=str(path),
            given=f"unreadable safetensors ({error})",
            allowed="a complete safetensors file",
            do="the file was truncated or altered: download or make it again",
        ) from error


def _assign(module: nn.Module, name: str, value: Tensor, *, is_parameter: bool) -> None:
    owner_path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(owner_path)
    if is_parameter:
        setattr(owner, leaf, nn.Parameter(value, requires_grad=False))
    else:
        owner.register_buffer(leaf, value)
