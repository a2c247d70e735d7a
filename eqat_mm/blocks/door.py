"""Are the stored tensors those of the model? Found out from the headers, before anything else is done with a folder."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from eqat_mm.blocks.quantized import refuse_quantized
from eqat_mm.blocks.stored import Stored
from eqat_mm.blocks.weights import WeightSource
from eqat_mm.errors import CheckpointError

_FLOATS = ("F16", "BF16", "F32")
_OF_RANKS = "shard-*-model-*-of-*.safetensors"


def require_one_answer(folder: Path, config: dict[str, Any]) -> None:
    """Check that nothing in a folder makes transformers read other weights than the ones that are read here.

    Args:
        folder: of the model.
        config: its config.json.

    Raises:
        CheckpointError: an adapter that it would add, or files that it would prefer.
    """
    others = [path.name for path in (folder / "adapter_config.json", *sorted(folder.glob(_OF_RANKS))) if path.is_file()]
    if config.get("transformers_weights") is not None:
        others.append("transformers_weights in config.json")
    if others:
        raise CheckpointError(
            where=str(folder),
            given=f"{others[0]}: the weights would not be those of model.safetensors alone",
            allowed="a model whose adapters are merged, in model.safetensors or in shards with an index",
            do="merge and save the model (merge_and_unload, save_pretrained), or move that file away",
        )


def check_stored(
    source: WeightSource,
    config: dict[str, Any],
    model: transformers.PreTrainedModel,
    merged: Callable[[str], Sequence[str]] = lambda _: (),
) -> list[Stored]:
    """Check that every tensor of a model is stored once, in its shape and in full precision.

    Args:
        source: what the files hold, by the names of the model.
        config: its config.json.
        model: built from that, on the meta device.
        merged: from a name in the files to the tensors of the model that are made of it and of others while reading.

    Returns:
        What is stored and has no place in the model, without what transformers knows to be harmless.

    Raises:
        CheckpointError: a tensor is missing, stored twice, of another shape or dtype; the model is quantized already;
            or there are more layers than the configuration has.
    """
    known, folder = model.state_dict(), source.folder
    made = {one.name: merged(one.name) for one in source.stored}
    found = {name: [one for one in ones if not made[one.name]] for name, ones in source.by_name.items()}
    found = {name: ones for name, ones in found.items() if ones}
    placed = [(one, known[name]) for name, ones in found.items() if name in known for one in ones]
    left_over = {name: ones[0] for name, ones in found.items() if name not in known and not _is_harmless(model, name)}
    refuse_quantized(folder, config, placed, left_over, known)
    _require_every_tensor(folder, model, {*found, *(name for names in made.values() for name in names)})
    _require_once({name: ones for name, ones in found.items() if name in known})
    for one, place in placed:
        _require_fit(one, place)
    _refuse_further_layers(folder, left_over, model)
    _require_one_matrix(source, model)
    return list(left_over.values())


def tied_groups(model: transformers.PreTrainedModel) -> list[list[str]]:
    """Return the names of parameters that are one tensor, those of which others are copies first."""
    groups: dict[str, list[str]] = {}
    for copy, original in (model.all_tied_weights_keys or {}).items():
        groups.setdefault(original, [original]).append(copy)
    return list(groups.values())


def _require_every_tensor(folder: Path, model: transformers.PreTrainedModel, present: set[str]) -> None:
    for group in tied_groups(model):
        if present.intersection(group):
            present.update(group)
    missing = [name for name in model.state_dict() if name not in present and not _may_be_missing(model, name)]
    if missing:
        raise CheckpointError(
            where=str(folder),
            given=f"no tensor {', '.join(missing[:3])}{_and_more(missing)}",
            allowed="a checkpoint with every weight of the model that config.json describes",
            do="download or convert the model again, weights and config.json together",
        )


def _require_once(found: Mapping[str, list[Stored]]) -> None:
    for name, ones in found.items():
        if len(ones) > 1:
            raise CheckpointError(
                where=f"{ones[0].path} and {ones[1].path}",
                given=f"the tensor {name} twice: {' and '.join(one.name for one in ones[:2])}",
                allowed="every tensor once",
                do="remove the files that do not belong to the model, or download it again",
            )


def _require_fit(one: Stored, place: Tensor) -> None:
    if one.shape != tuple(place.shape):
        raise CheckpointError(
            where=f"{one.path}: {one.name}",
            given=f"shape {list(one.shape)}",
            allowed=f"{list(place.shape)}, as config.json says",
            do="bring together weights and config.json of the same model",
        )
    if place.is_floating_point() and one.dtype not in _FLOATS:
        raise CheckpointError(
            where=f"{one.path}: {one.name}",
            given=one.dtype,
            allowed=", ".join(_FLOATS),
            do="save the model in one of these dtypes",
        )


def _refuse_further_layers(folder: Path, left_over: Mapping[str, Stored], model: nn.Module) -> None:
    """Refuse a model that would be read without some of its layers: half of one predicts, too."""
    stacks = {path: len(module) for path, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    for name, one in left_over.items():
        for layer in re.finditer(r"\.(\d+)\.", name):
            if int(layer[1]) >= stacks.get(name[: layer.start()], sys.maxsize):
                raise CheckpointError(
                    where=str(folder),
                    given=f"{one.name}, in a layer beyond those that config.json counts",
                    allowed="as many layers in config.json as in the files",
                    do="correct the number of layers (num_hidden_layers), or bring together weights and config.json",
                )


def _require_one_matrix(source: WeightSource, model: transformers.PreTrainedModel) -> None:
    """Check that what the configuration ties is one matrix, where both are stored; they are few, so values are read."""
    for first, *others in tied_groups(model):
        for name in others:
            if first in source and name in source and not _same(source.read(first), source.read(name)):
                raise CheckpointError(
                    where=str(source.folder),
                    given=f"config.json ties {name} to {first}, but two different tensors are stored",
                    allowed="the same tensor, or one of them alone",
                    do="set tie_word_embeddings to false in config.json if both are meant, or remove one",
                )


def _same(left: Tensor, right: Tensor) -> bool:
    return torch.equal(left.to(right.dtype), right)


def _is_harmless(model: transformers.PreTrainedModel, name: str) -> bool:
    """Whether transformers passes over a tensor that the model lacks without a word, as we do."""
    patterns = list(model._keys_to_ignore_on_load_unexpected or ())
    return any(re.search(pattern, name) for pattern in (*patterns, r"rotary_emb\.inv_freq", r"(^|\.)position_ids$"))


def _may_be_missing(model: transformers.PreTrainedModel, name: str) -> bool:
    return any(re.search(pattern, name) for pattern in model._keys_to_ignore_on_load_missing or ())


def _and_more(names: Sequence[str]) -> str:
    return f" and {len(names) - 3} more" if len(names) > 3 else ""
