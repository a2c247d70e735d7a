"""A packed checkpoint read by transformers' `from_pretrained`: what is done before and behind its weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from transformers.utils.hub import cached_file

from eqat_mm.blocks.attention import quantize_keys_and_values
from eqat_mm.blocks.config import CONFIG
from eqat_mm.checkpoint.adapters import load_adapters, teach_peft
from eqat_mm.checkpoint.build import insert_packed
from eqat_mm.checkpoint.layout import SCALE_SUFFIX, described
from eqat_mm.checkpoint.manifest import ADAPTER, MANIFEST, Manifest, read_manifest
from eqat_mm.checkpoint.origin import Origin
from eqat_mm.checkpoint.pretrained import as_packed
from eqat_mm.checkpoint.read import freeze_all_but_step_sizes
from eqat_mm.checkpoint.source import PackedSource, packed_names, published_packed_names
from eqat_mm.runtime.files import read_json_object


@dataclass(frozen=True)
class Found:
    """What files hold for a model.

    Attributes:
        source: the tensors in them.
        published: name of a tensor in a file -> its name in published files.
        manifest: of the checkpoint; where the folder has none, what its configuration says in that form.
        there: whether the folder has one.
    """

    source: PackedSource
    published: dict[str, str]
    manifest: Manifest
    there: bool

    @classmethod
    def of(cls, model: PreTrainedModel, files: list[Path], entry: dict[str, Any]) -> Found:
        """Look at the files for `model`, which is on the meta device and not packed yet.

        Raises:
            CheckpointError: files that contradict each other, or a manifest that was altered.
        """
        folder = files[0].parent
        source, publish = PackedSource(folder, packed_names(model), files), published_packed_names(model)
        headers = _headers(source)
        dtypes = [header.dtype for name, header in headers.items() if name.endswith(SCALE_SUFFIX)]
        spec, widths = described({"quantization_config": entry}, dtypes[0] if dtypes else None, str(folder / CONFIG))
        there = _fetched(folder, str(model.config.name_or_path))
        told = Manifest("", spec.as_dict(), "", "", {}, [], *widths.dynamic)
        published = {one.name: publish(one.name) for one in source.stored}
        return cls(source, published, read_manifest(folder) if there else told, there)

    def make_packed(self, model: PreTrainedModel) -> None:
        """Replace the linears of `model` that are quantized by empty packed ones.

        Raises:
            CheckpointError: step sizes of what is no linear of it.
        """
        scales = [name for name in _headers(self.source) if name.endswith(SCALE_SUFFIX)]
        insert_packed(model, scales, self.manifest, str(self.source.folder))
        quantize_keys_and_values(model, self.manifest.kv_cache_bits)

    def complete(self, model: PreTrainedModel) -> None:
        """Make `model`, filled by now, what `load` returns; without a manifest it cannot write a whole checkpoint.

        Raises:
            ConfigError: the checkpoint has low-rank adapters, and `peft` is not installed.
            CheckpointError: they are not those of this model.
        """
        teach_peft()
        if self.manifest.has_adapters:
            load_adapters(model, self.source.folder / ADAPTER)
        freeze_all_but_step_sizes(model)
        if self.there:
            folder = self.source.folder
            raw = read_json_object(folder / CONFIG)
            as_packed(model, Origin.of(model, folder, self.manifest, raw, self.source.shards(), self.published))


def _headers(source: PackedSource) -> dict[str, Any]:
    return {name: header for stored in source.shards().values() for name, header in stored.values()}


def _fetched(folder: Path, name: str) -> bool:
    """Whether the folder has a manifest; in the cache of the hub it is fetched, as weights are."""
    if not (folder / MANIFEST).is_file() and folder.parent.name == "snapshots":
        may = {
            f"_raise_exceptions_for_{what}": False for what in ("gated_repo", "missing_entries", "connection_errors")
        }
        cached_file(name, MANIFEST, revision=folder.name, **may)
    return (folder / MANIFEST).is_file()
