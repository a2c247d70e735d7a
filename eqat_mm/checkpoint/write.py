"""Writing a checkpoint shard by shard; the manifest comes last."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from eqat_mm.blocks.source import OpenModel
from eqat_mm.checkpoint.adapters import has_adapters, save_adapters, without_adapters
from eqat_mm.checkpoint.companions import copy_companions
from eqat_mm.checkpoint.layout import (
    BYTES,
    SCALE_SUFFIX,
    format_of,
    ignored_linears,
    quantization_config,
    to_bytes,
)
from eqat_mm.checkpoint.manifest import ADAPTER, Manifest
from eqat_mm.checkpoint.origin import Origin
from eqat_mm.checkpoint.seal import seal
from eqat_mm.checkpoint.shards import save_shard
from eqat_mm.checkpoint.speaker import restyled, write_over
from eqat_mm.checkpoint.unfinished import folder_in_the_making, replace_files, require_place
from eqat_mm.data.image_text.style import Style
from eqat_mm.errors import ConfigError
from eqat_mm.quant.bit_widths import UNQUANTIZED, BitWidths
from eqat_mm.quant.grid import as_stored
from eqat_mm.quant.packed_linear import PackedLinear
from eqat_mm.quant.spec import QuantSpec
from eqat_mm.runtime.files import read_json, write_text

_PIECE = 1 << 22
"""Numbers that are compared at a time."""

_SAVING = ".saving-"
"""Begins the name of the folder in which a checkpoint is made before its files are moved into place."""


class CheckpointWriter:
    """Writes one shard per block, then everything else.

    A shard is complete or absent. Nothing in the folder is a checkpoint until `finish`. Tensors are named as in
    published files of such a model, which engines and older readers know, whatever the files of the source call them.

    Args:
        folder: of the checkpoint.
        opened: the full-precision model it is made from.
        spec: of its quantized linears, resolved.
        widths: of activations and KV cache; None where neither is quantized.

    Raises:
        ConfigError: `folder` is that of the source.
    """

    def __init__(self, folder: Path, opened: OpenModel, spec: QuantSpec, widths: BitWidths | None = None) -> None:
        self.folder = folder
        self.opened = opened
        self.spec = spec
        self.widths = widths or BitWidths(spec.bits)
        self._count = len(opened.blocks) + 1
        if folder.resolve() == opened.folder.resolve():
            raise ConfigError("--output", f"{folder}, the source model", "another folder", "choose another --output")
        folder.mkdir(parents=True, exist_ok=True)

    def write_block(self, index: int, block: nn.Module) -> str:
        """Write the packed block `index`; unquantized tensors keep the dtype of the source.

        Returns:
            The SHA-256 of its shard.

        Raises:
            ConfigError: step sizes that are not finite; names the layer.
        """
        prefix, state = self.opened.block_name(index) + ".", stored_state(block)
        if format_of(self.widths) == BYTES:
            state = to_bytes(state)
        return self._write(index, {prefix + name: tensor for name, tensor in state.items()})

    def finish(
        self,
        stage: str,
        source: str,
        provenance: dict[str, Any],
        trained: Mapping[str, Tensor] | None = None,
        digests: Mapping[Path, str] | None = None,
        style: Style | None = None,
    ) -> Manifest:
        """Write what was not quantized, tokenizer and processor, index, config and manifest.

        Args:
            stage: for the manifest.
            source: the full-precision model, as it was named.
            provenance: of this stage.
            trained: tensors by name that replace those of the source.
            digests: SHA-256 of shards as `write_block` gave it, by path.
            style: how the model is addressed from now on; None as it was trained before.

        Raises:
            CheckpointError: a shard is missing or truncated, or has another SHA-256 by now.
        """
        prefix, known = f"{self.opened.arch.blocks}.", self.opened.model.state_dict()
        rest = [name for name in self.opened.source.names() if name in known and not name.startswith(prefix)]
        stored = {name: self.opened.source.read(name) for name in rest}
        changed = {
            name: _like(value, stored[name].dtype, stored[name])
            for name, value in (trained or {}).items()
            if name in stored
        }
        self._write(self._count - 1, stored | changed)
        copy_companions(self.opened.folder, self.folder)
        write_over(self.folder, restyled(self.opened.folder, style))
        config = read_json(self.opened.folder / "config.json")
        ignore = ignored_linears(self.opened.arch, self.opened.model, self.opened.source)
        channels = None if self.widths.kv_cache == UNQUANTIZED else head_dim(self.opened)
        loose = [part.path for part in self.opened.arch.full_precision_parts(self.opened.model) if not part.whole]
        config["quantization_config"] = quantization_config(self.spec, ignore, self.widths, channels, loose)
        files = [self.shard(index) for index in range(self._count)]
        made = Manifest(
            self.opened.arch.name,
            self.spec.as_dict(),
            stage,
            source,
            {},
            [provenance],
            *self.widths.dynamic,
            auto_class=self.opened.arch.auto_class,
        )
        return seal(self.folder, files, config, made, digests or {})

    def shard(self, index: int) -> Path:
        """Return the file of block `index`; what was not quantized comes behind the last one."""
        return self.folder / f"model-{index + 1:05d}-of-{self._count:05d}.safetensors"

    def _write(self, index: int, tensors: dict[str, Tensor]) -> str:
        source, cast = self.opened.source, {}
        for name, tensor in tensors.items():
            keeps = name in source and tensor.is_floating_point()
            kept = source.read(name).dtype if keeps else tensor.dtype
            cast[source.published_name(name)] = tensor.to(kept)
        return save_shard(self.shard(index), cast)


def head_dim(opened: OpenModel) -> int:
    """Return the channels of one head of a key."""
    config: Any = opened.model.config.get_text_config(decoder=True)  # type: ignore[operator, union-attr]
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def stored_state(module: nn.Module) -> dict[str, Tensor]:
    """Return the state dict of a packed module with step sizes as they are stored."""
    state = dict(module.state_dict())
    for path, child in module.named_modules():
        if isinstance(child, PackedLinear):
            name = f"{path}{SCALE_SUFFIX}"
            state[name] = as_stored(state[name], child.spec)
    return state


def save_like(
    model: PreTrainedModel,
    folder: Path,
    base: Path,
    stage: str,
    provenance: dict[str, Any],
    companions: Mapping[str, str | None] | None = None,
) -> Manifest:
    """Write `model`, trained from the checkpoint `base`, under published names, with the shards and dtypes of `base`.

    What training left as it was is copied byte for byte, whatever the dtype the model was loaded in; adapters lie in
    a folder beside. The folder appears whole: it is written under a temporary name and renamed.

    Args:
        model: packed model, loaded from `base`.
        folder: new checkpoint; replaced where it exists.
        base: checkpoint that the model was loaded from, where it is now.
        stage: for the manifest.
        provenance: of this stage; appended to those of `base`.
        companions: files that replace those of `base`, see `restyled`.
    """
    origin = replace(_origin_of(model), folder=base)
    with folder_in_the_making(folder) as partial:
        return _write_again(model, origin, partial, stage, provenance, companions or {})


def save_into(model: PreTrainedModel, folder: Path, provenance: dict[str, Any]) -> Manifest:
    """Write a loaded model, trained or not, into a folder, in which other files stay; see `save_like`.

    Where the checkpoint that it was loaded from is gone, or another by now, all tensors are written as they are in
    memory, and nothing is there that came with the model, such as its tokenizer; a warning says so.

    Args:
        model: packed model, loaded with `eqat_mm.load`.
        folder: made where it does not exist; a packed checkpoint in it is replaced.
        provenance: of this step; appended to those of the checkpoint it was loaded from.

    Raises:
        CheckpointError: the folder holds a model that is no packed checkpoint.
    """
    require_place(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob(f"{_SAVING}*"):  # of a process that was killed
        shutil.rmtree(leftover)
    origin = _origin_of(model)
    with TemporaryDirectory(dir=folder, prefix=_SAVING) as name:
        made = _write_again(model, origin, Path(name), origin.manifest.stage, provenance, {})
        replace_files(folder, Path(name))
    if folder.resolve() == origin.folder.resolve():
        vars(model)["checkpoint_origin"] = replace(origin, manifest=made)
    return made


def _origin_of(model: PreTrainedModel) -> Origin:
    origin = getattr(model, "checkpoint_origin", None)
    assert isinstance(origin, Origin), f"{type(model).__name__} was not loaded with eqat_mm.load"
    return origin


def _write_again(
    model: PreTrainedModel,
    origin: Origin,
    folder: Path,
    stage: str,
    provenance: dict[str, Any],
    companions: Mapping[str, str | None],
) -> Manifest:
    base, state = origin.unchanged(), without_adapters(stored_state(model))
    if format_of(origin.manifest.widths) == BYTES:
        state = to_bytes(state)
    digests = {}
    for file, names in origin.shards.items():
        kept = {stored: name for stored, name in names.items() if name in origin.dtypes}
        tensors = {
            origin.published[stored]: _like(
                state[name], origin.dtypes[name], None if base is None else base.read(stored)
            )
            for stored, name in kept.items()
        }
        digests[folder / file] = save_shard(folder / file, tensors)
    if has_adapters(model):
        save_adapters(model, folder / ADAPTER)
    _write_companions(model, origin, folder, there=base is not None)
    write_over(folder, companions)
    made = replace(origin.manifest.renewed(), stage=stage, provenance=[*origin.manifest.provenance, provenance])
    return seal(folder, list(digests), origin.config_of(model), made, digests)


def _like(value: Tensor, dtype: torch.dtype, stored: Tensor | None) -> Tensor:
    """Return `value` in a dtype, or `stored`, which has it, where they are the same number."""
    value = value.detach().cpu()
    return stored if stored is not None and _same(stored, value) else value.to(dtype)


def _same(stored: Tensor, value: Tensor) -> bool:
    """Whether two tensors hold the same numbers; a piece at a time, for an embedding in another dtype is large."""
    if stored.shape != value.shape:
        return False
    pieces = zip(stored.reshape(-1).split(_PIECE), value.reshape(-1).split(_PIECE), strict=True)
    return all(torch.equal(one.to(two.dtype), two) for one, two in pieces)


def _write_companions(model: PreTrainedModel, origin: Origin, folder: Path, *, there: bool) -> None:
    """Write what comes with the model: copies, but for generation settings that were changed since."""
    if there:
        copy_companions(origin.folder, folder)
    else:
        warnings.warn(
            f"{origin.folder} is gone, or another checkpoint by now: saved without tokenizer, processor and chat "
            "template; what is not quantized is saved as it is in memory",
            stacklevel=2,
        )
    settings = model.generation_config
    if settings is not None and not (there and settings.to_dict() == origin.generation):
        write_text(folder / "generation_config.json", settings.to_json_string())
