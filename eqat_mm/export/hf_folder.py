"""A Hugging Face folder with other tensors in place of each packed linear, written shard by shard."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eqat_mm.blocks.config import CONFIG
from eqat_mm.blocks.stored import INDEX
from eqat_mm.checkpoint.shards import save_shard
from eqat_mm.checkpoint.spelling import spelled_for_all
from eqat_mm.errors import ExportError
from eqat_mm.export.opened import PackedModel, PackedWeight
from eqat_mm.runtime.files import write_json
from eqat_mm.runtime.progress import progress

Tensors = dict[str, Tensor]


class Unchanged:
    """What is true of a format that holds every step size and zero point: part of `eqat_mm.export.form.Format`."""

    def changed(self, weight: PackedWeight) -> Tensor:
        """Return False for every group, bool [O, G]."""
        return torch.zeros(weight.out_features, weight.layout.groups, dtype=torch.bool)

    def held(self, weight: PackedWeight) -> Tensor:
        """Return the weight of the checkpoint, float32 [O, I]."""
        return weight.dense()

    def nearest(self, model: PackedModel) -> str:
        """Say that the model itself is held."""
        return model.spec.name


def write_hf_folder(
    model: PackedModel,
    folder: Path,
    tensors_of: Callable[[PackedWeight], Tensors],
    settings: dict[str, Any],
    called: Callable[[str], str],
) -> None:
    """Write shards, index and config.json; what is not a packed linear is copied byte for byte.

    Args:
        model: the checkpoint; one of its shards is in memory at once.
        folder: to write into.
        tensors_of: gives the tensors that stand for a linear, by the last part of their names.
        settings: entries of config.json that take the place of `quantization_config`.
        called: from the name of a tensor or linear in the model to that in the files.
    """
    shards = list(model.shards())
    weight_map: dict[str, str] = {}
    for number, names in enumerate(progress(shards, what="write", total=len(shards), unit="shard"), 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors = _of_shard(model, {name: called(name) for name in names}, tensors_of)
        save_shard(folder / file, tensors)
        weight_map |= dict.fromkeys(tensors, file)
    total = sum((folder / file).stat().st_size for file in set(weight_map.values()))
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    config = {name: value for name, value in model.config.items() if name != "quantization_config"}
    write_json(folder / CONFIG, spelled_for_all(config) | settings)


def _of_shard(model: PackedModel, names: dict[str, str], tensors_of: Callable[[PackedWeight], Tensors]) -> Tensors:
    tensors: Tensors = {}
    for name, called in names.items():
        weight = model.weights.get(name)
        if weight is None:
            tensors[called] = model.source.read(name)
        else:
            tensors |= {f"{called}.{leaf}": tensor for leaf, tensor in tensors_of(weight).items()}
    return tensors


def common_group(model: PackedModel, form: str, sizes: Sequence[int]) -> int:
    """Return the first of `sizes`, the largest first, that divides every group of the model.

    A group is several smaller ones that have one step size and one zero point.

    Args:
        model: the checkpoint.
        form: name of the format, for messages.
        sizes: of the groups that the format knows.

    Raises:
        ExportError: none divides them; names the linear at fault.
    """
    groups = {name: weight.group_size for name, weight in model.weights.items()}
    fitting = [size for size in sizes if all(group % size == 0 for group in groups.values())]
    if fitting:
        return fitting[0]
    odd = next(name for name, group in groups.items() if group % sizes[-1])
    raise ExportError(
        where=f"--to {form}, at {odd}",
        given=f"groups of {groups[odd]} weights",
        allowed=f"groups that are multiples of {sizes[-1]}",
        do="quantize the model in such groups (--quant.group_size), or serve the checkpoint itself (docs/formats.md)",
    )


def require_same_bits(model: PackedModel, form: str) -> None:
    """Check that all linears have the same bits.

    Raises:
        ExportError: they have not, and the format has one number for all.
    """
    if model.spec.table:
        raise ExportError(
            where=f"--to {form}, from {model.folder}",
            given=f"linears of {model.spec.widths} bits",
            allowed="the same bits in all linears",
            do="choose --to mlx or gguf, which say it of each tensor, or serve the checkpoint itself (docs/formats.md)",
        )


def repeated(values: Tensor, weight: PackedWeight, group: int) -> Tensor:
    """Return values of groups [O, G] for groups of a size that divides theirs, [O, I / group]."""
    return values.repeat_interleave(weight.group_size // group, 1)


def takes_images(model: PackedModel) -> bool:
    """Whether a model has a vision tower."""
    return hasattr(model.full_config, "vision_config")


def require_known_kind(model: PackedModel, form: str, unread: dict[str, str]) -> None:
    """Check that the readers of a format compute a model as transformers does; of those with images, LLaVA-1.5.

    Args:
        model: the checkpoint.
        form: name of the format.
        unread: type of a language model -> why it is none.

    Raises:
        ExportError: it is not.
    """
    kind = model.full_config.model_type
    why = "its readers put images into the text in another way" if takes_images(model) and kind != "llava" else None
    why = why or unread.get(kind)
    if why:
        raise no_reader(model, form, f"{kind}: {why}", "language models without experts, and LLaVA-1.5")


def no_reader(model: PackedModel, form: str, given: str, allowed: str) -> ExportError:
    """Return that the readers of a format know no such model."""
    do = "serve the checkpoint itself (docs/formats.md), or choose another --to"
    return ExportError(f"--to {form}, from {model.folder}", given, allowed, do)
