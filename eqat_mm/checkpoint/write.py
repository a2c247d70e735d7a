"""Writing a checkpoint shard by shard; the manifest comes last."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from eqat_mm.blocks.source import INDEX, OpenModel, WeightSource, module_names, weight_files
from eqat_mm.checkpoint.adapters import ADAPTER, has_adapters, save_adapters, state_without_adapters
from eqat_mm.checkpoint.layout import (
    BYTES,
    SCALE_SUFFIX,
    format_of,
    ignored_linears,
    quantization_config,
    to_bytes,
)
from eqat_mm.checkpoint.verify import MANIFEST, Manifest, read_manifest
from eqat_mm.quant.bit_widths import UNQUANTIZED, BitWidths
from eqat_mm.quant.packed_linear import PackedLinear
from eqat_mm.quant.spec import QuantSpec
from eqat_mm.runtime.files import atomic_path, read_json, sha256_of, write_json

_COMPANIONS = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "LICENSE*", "NOTICE*")
_NOT_COMPANIONS = ("config.json", INDEX, MANIFEST, "trainer_state.json", "asset.json")


class CheckpointWriter:
    """Writes one shard per block, then everything else.

    A shard is complete or absent. Nothing in the folder is a checkpoint until `finish`. Tensors are named as in the
    files of the source, which older readers know, too.

    Args:
        folder: of the checkpoint.
        opened: the full-precision model it is made from.
        spec: of its quantized linears.
        widths: of activations and KV cache; None where neither is quantized.
    """

    def __init__(self, folder: Path, opened: OpenModel, spec: QuantSpec, widths: BitWidths | None = None) -> None:
        self.folder = folder
        self.opened = opened
        self.spec = spec
        self.widths = widths or BitWidths(spec.bits)
        self._count = len(opened.blocks) + 1
        folder.mkdir(parents=True, exist_ok=True)

    def write_block(self, index: int, block: nn.Module) -> None:
        """Write the packed block `index`; unquantized tensors keep the dtype of the source."""
        prefix, state = self.opened.block_name(index) + ".", stored_state(block)
        if format_of(self.widths) == BYTES:
            state = to_bytes(state)
        self._write(index, {prefix + name: tensor for name, tensor in state.items()})

    def finish(
        self, stage: str, source: str, provenance: dict[str, Any], trained: Mapping[str, Tensor] | None = None
    ) -> Manifest:
        """Write what was not quantized, tokenizer and processor, index, config and manifest.

        Args:
            stage: for the manifest.
            source: the full-precision model, as it was named.
            provenance: of this stage.
            trained: tensors by name that replace those of the source.
        """
        prefix = f"{self.opened.arch.blocks}."
        rest = [name for name in self.opened.source.names() if not name.startswith(prefix)]
        stored = {name: self.opened.source.read(name) for name in rest}
        changed = {name: _like(stored[name], value) for name, value in (trained or {}).items() if name in stored}
        self._write(self._count - 1, stored | changed)
        copy_companions(self.opened.folder, self.folder)
        config = read_json(self.opened.folder / "config.json")
        ignore = ignored_linears(self.opened.arch, self.opened.model)
        channels = None if self.widths.kv_cache == UNQUANTIZED else head_dim(self.opened)
        config["quantization_config"] = quantization_config(self.spec, ignore, self.widths, channels)
        files = [self.shard(index) for index in range(self._count)]
        made = Manifest(
            self.opened.arch.name, self.spec.as_dict(), stage, source, {}, [provenance], *self.widths.dynamic
        )
        return _seal(self.folder, files, config, made)

    def shard(self, index: int) -> Path:
        """Return the file of block `index`; what was not quantized comes behind the last one."""
        return self.folder / f"model-{index + 1:05d}-of-{self._count:05d}.safetensors"

    def _write(self, index: int, tensors: dict[str, Tensor]) -> None:
        source, cast = self.opened.source, {}
        for name, tensor in tensors.items():
            keeps = name in source and tensor.is_floating_point()
            kept = source.read(name).dtype if keeps else tensor.dtype
            cast[source.stored_name(name)] = tensor.to(kept)
        save_shard(self.shard(index), cast)


def head_dim(opened: OpenModel) -> int:
    """Return the channels of one head of a key."""
    config: Any = opened.model.config.get_text_config(decoder=True)  # type: ignore[operator, union-attr]
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def stored_state(module: nn.Module) -> dict[str, Tensor]:
    """Return the state dict of a packed module with step sizes in their storage dtype."""
    state = dict(module.state_dict())
    for path, child in module.named_modules():
        if isinstance(child, PackedLinear):
            name = f"{path}{SCALE_SUFFIX}"
            state[name] = state[name].to(child.spec.storage_dtype)
    return state


def save_like(model: PreTrainedModel, folder: Path, base: Path, stage: str, provenance: dict[str, Any]) -> Manifest:
    """Write `model`, a trained copy of the checkpoint `base`, with the shards, names and dtypes of `base`.

    What training left as it was is copied byte for byte, whatever the dtype the model was loaded in; adapters lie in
    a folder beside. The folder appears whole: it is written under a temporary name and renamed.

    Args:
        model: packed model, loaded from `base`.
        folder: new checkpoint; replaced where it exists.
        base: checkpoint that the model was loaded from.
        stage: for the manifest.
        provenance: of this stage; appended to those of `base`.
    """
    before = read_manifest(base)
    with _folder_in_the_making(folder) as partial:
        state, rename, source = state_without_adapters(model), module_names(model), WeightSource(base)
        if format_of(before.widths) == BYTES:
            state = to_bytes(state)
        files = []
        for path in weight_files(base):
            names = WeightSource.names_of(path)
            save_shard(partial / path.name, {name: _like(source.read(name), state[rename(name)]) for name in names})
            files.append(partial / path.name)
        adapters = save_adapters(model, partial / ADAPTER) if has_adapters(model) else []
        copy_companions(base, partial)
        made = replace(before, stage=stage, provenance=[*before.provenance, provenance])
        return _seal(partial, files, read_json(base / "config.json"), made, adapters)


def _like(stored: Tensor, value: Tensor) -> Tensor:
    """Return `value` in the dtype of `stored`, or `stored` where they are the same number."""
    value = value.detach().cpu()
    return stored if torch.equal(stored.to(value.dtype), value) else value.to(stored.dtype)


@contextmanager
def _folder_in_the_making(folder: Path) -> Iterator[Path]:
    """Yield an empty folder beside `folder`; on success it replaces `folder`, on any exception it is removed."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def save_shard(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write one safetensors file atomically."""
    with atomic_path(path) as temporary:
        save_file(
            {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
            str(temporary),
            metadata={"format": "pt"},
        )


def copy_companions(source: Path, folder: Path) -> None:
    """Copy tokenizer, processor, generation settings and licences, byte for byte."""
    for pattern in _COMPANIONS:
        for path in source.glob(pattern):
            if path.name not in _NOT_COMPANIONS:
                shutil.copyfile(path, folder / path.name)


def _seal(
    folder: Path, files: list[Path], config: dict[str, Any], made: Manifest, adapters: Iterable[Path] = ()
) -> Manifest:
    """Write index and config, then the manifest with the hashes of the files."""
    weight_map, total = {}, 0
    digests = {path.relative_to(folder).as_posix(): sha256_of(path) for path in (*files, *adapters)}
    for path in files:
        total += path.stat().st_size
        weight_map.update(dict.fromkeys(WeightSource.names_of(path), path.name))
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    write_json(folder / "config.json", config)
    manifest = replace(made, files=digests)
    manifest.write(folder)
    return manifest
