"""Weights read from safetensors when they are needed, one tensor at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from eqat_mm.blocks.stored import Stored, open_safetensors, stored_in, weight_files
from eqat_mm.errors import CheckpointError


class WeightSource:
    """Tensors of a Hugging Face model folder by name, read one at a time.

    Args:
        folder: holds `model.safetensors`, or shards and `model.safetensors.index.json`.
        rename: from a name in the files to the name by which the tensor is asked for; see `module_names`.
        publish: from a name in the files to the one in published files of such a model; see `published_names`.
        files: some files of the folder, where it is not complete yet; None takes all that its index names.

    Attributes:
        stored: every tensor in the files.
        by_name: the same by name; of a sound model each name has one.

    Raises:
        CheckpointError: no weights, a missing shard, or a file that is not safetensors (truncated, altered).
    """

    def __init__(
        self,
        folder: Path,
        rename: Callable[[str], str] = str,
        files: Iterable[Path] | None = None,
        publish: Callable[[str], str] = str,
    ) -> None:
        self.folder = folder
        self.stored = [one for path in (weight_files(folder) if files is None else files) for one in stored_in(path)]
        self._ties: dict[str, str] = {}
        self._finite: set[str] = set()
        self.name_by(rename, publish)

    def name_by(self, rename: Callable[[str], str], publish: Callable[[str], str] = str) -> None:
        """From now on ask for tensors by what `rename` makes of their names in the files, and publish them likewise."""
        self._publish = publish
        self.by_name: dict[str, list[Stored]] = {}
        for one in self.stored:
            self.by_name.setdefault(rename(one.name), []).append(one)
        self._where = {name: (ones[-1].path, ones[-1].name) for name, ones in self.by_name.items()}

    def tie(self, groups: Iterable[Iterable[str]]) -> None:
        """Let a name that is not stored be read as another one of its group, which is the same parameter."""
        for group in groups:
            stored = [name for name in group if name in self]
            self._ties |= {name: stored[0] for name in group if name not in self and stored}

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def names(self) -> list[str]:
        """All tensor names."""
        return list(self._where)

    def stored_name(self, name: str) -> str:
        """Return what the files call a tensor; one that they lack is named like the weight of its module."""
        return self._named(name, str)

    def published_name(self, name: str) -> str:
        """Return what published files of such a model call a tensor; one that is not stored as `stored_name` has it."""
        return self._named(name, self._publish)

    def _named(self, name: str, called: Callable[[str], str]) -> str:
        if name in self._where:
            return called(self._where[name][1])
        module, _, leaf = name.rpartition(".")
        return called(self._where[f"{module}.weight"][1]).removesuffix("weight") + leaf

    def read(self, name: str) -> Tensor:
        """Return one tensor in its stored dtype, backed by the file.

        The file is mapped for this tensor alone, so its pages go when the tensor goes.

        Raises:
            CheckpointError: no tensor of that name, or not all of its values are finite.
        """
        name = self._ties.get(name, name)
        if name not in self:
            raise CheckpointError(
                where=str(self.folder),
                given=f"no tensor {name}",
                allowed="a checkpoint with every weight of the model",
                do="download or convert the model again",
            )
        path, stored = self._where[name]
        with open_safetensors(path) as reader:
            tensor: Tensor = reader.get_tensor(stored)
        if stored not in self._finite:
            _require_finite(tensor, f"{path}: {stored}")
            self._finite.add(stored)
        return tensor

    @staticmethod
    def names_of(path: Path) -> list[str]:
        """Return the tensor names in one safetensors file."""
        return [one.name for one in stored_in(path)]

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
            CheckpointError: a tensor is not stored, or not finite.
        """
        tensors = [*module.named_parameters(recurse=recurse), *module.named_buffers(recurse=recurse)]
        for name, tensor in tensors:
            if tensor.is_meta:
                value = self.read(prefix + name).to(device)
                value = value.to(dtype) if value.is_floating_point() else value
                _assign(module, name, value, is_parameter=isinstance(tensor, nn.Parameter))


def release(module: nn.Module, *, recurse: bool = True) -> None:
    """Put the parameters of `module` back on the meta device; computed buffers stay."""
    for name, parameter in list(module.named_parameters(recurse=recurse)):
        _assign(module, name, parameter.detach().to("meta"), is_parameter=True)


def stand_in(module: nn.Module, dtype: torch.dtype) -> None:
    """Put one zero on the CPU, expanded, in place of every meta parameter: shape, device and dtype without memory."""
    for name, parameter in list(module.named_parameters()):
        if parameter.is_meta:
            _assign(module, name, torch.zeros((), dtype=dtype).expand(parameter.shape), is_parameter=True)


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor holds neither NaN nor infinity; whole numbers and 8-bit floats are taken as finite.

    One pass without a copy: minimum and maximum are NaN where one value is.
    """
    if not tensor.is_floating_point() or tensor.element_size() < 2 or tensor.numel() == 0:
        return True
    low, high = tensor.detach().aminmax()
    return bool((low.isfinite() & high.isfinite()).item())


def _require_finite(tensor: Tensor, where: str) -> None:
    if not is_finite(tensor):
        raise CheckpointError(
            where=where,
            given=f"{int((~tensor.isfinite()).sum())} of {tensor.numel()} values are not finite (NaN or infinity)",
            allowed="finite numbers",
            do="download the file again; if it is as published, make the model finite first",
        )


def _assign(module: nn.Module, name: str, value: Tensor, *, is_parameter: bool) -> None:
    owner_path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(owner_path)
    if is_parameter:
        setattr(owner, leaf, nn.Parameter(value, requires_grad=False))
    else:
        owner.register_buffer(leaf, value)
