"""A packed checkpoint as exporters write it: quantized linears one by one, and all other tensors, none of them kept."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eqat_kernels import PackedLayout, dequantize, unpack
from eqat_mm.blocks.config import CONFIG, read_config
from eqat_mm.checkpoint.build import require_described, skeleton
from eqat_mm.checkpoint.layout import SCALE_SUFFIX
from eqat_mm.checkpoint.manifest import Manifest
from eqat_mm.checkpoint.source import PackedSource, packed_names, published_packed_names
from eqat_mm.checkpoint.verify import verify_checkpoint
from eqat_mm.errors import CheckpointError
from eqat_mm.quant.bit_widths import UNQUANTIZED
from eqat_mm.quant.spec import QuantSpec
from eqat_mm.runtime.files import read_json_object

_LEAVES = ("weight", "weight_packed", "weight_scale", "weight_zero_point", "weight_shape")


@dataclass(frozen=True)
class PackedWeight:
    """The weight of one quantized linear (O outputs, I inputs, G groups, N bits), read whenever it is asked for.

    Attributes:
        name: path of the linear in the model, such as `model.layers.0.mlp.up_proj`.
        spec: bits and symmetry; its group size may be -1.
        out_features: O.
        in_features: I.
        source: the files.
    """

    name: str
    spec: QuantSpec
    out_features: int
    in_features: int
    source: PackedSource

    @property
    def group_size(self) -> int:
        """Consecutive inputs that share a step size, never -1."""
        return self.spec.group_of(self.in_features, self.name)

    @property
    def layout(self) -> PackedLayout:
        """Shape as the kernels take it."""
        return PackedLayout(self.spec.bits, self.group_size, self.out_features, self.in_features)

    def words(self) -> Tensor:
        """Return the packed codes, int32 [O, ceil(I*N/32)]: a dense little-endian stream of N bits each."""
        return self.source.read(f"{self.name}.weight_packed")

    def scale(self) -> Tensor:
        """Return the step sizes s as they are stored, bfloat16 or float16 [O, G]."""
        return self.source.read(f"{self.name}{SCALE_SUFFIX}")

    def zero_words(self) -> Tensor | None:
        """Return the packed zero points, int32 [ceil(O*N/32), G], packed along O; None on the symmetric grid."""
        return None if self.spec.symmetric else self.source.read(f"{self.name}.weight_zero_point")

    def codes(self) -> Tensor:
        """Return the codes q, uint8 [O, I]."""
        return unpack(self.words(), self.spec.bits, self.in_features)

    def zero_points(self) -> Tensor:
        """Return the zero points z, uint8 [O, G]; 2^(N-1) everywhere on the symmetric grid."""
        words = self.zero_words()
        if words is None:
            return torch.full((self.out_features, self.layout.groups), self.spec.middle, dtype=torch.uint8)
        return unpack(words.T.contiguous(), self.spec.bits, self.out_features).T.contiguous()

    def dense(self) -> Tensor:
        """Return the weight (q - z) s, float32 [O, I]."""
        scale = self.scale().to(torch.float32)
        return dequantize(self.words(), scale, self.zero_words(), self.layout, torch.float32)


@dataclass(frozen=True)
class PackedModel:
    """A packed checkpoint, whole and unaltered; nothing of its weights is in memory.

    Attributes:
        folder: of the checkpoint.
        manifest: what it says of itself.
        config: content of config.json.
        spec: of its quantized linears.
        source: its tensors, by their names in the model.
        weights: the quantized linears by name, in the order of the files.
        others: names of all other tensors, biases of quantized linears among them, in the order of the files.
    """

    folder: Path
    manifest: Manifest
    config: dict[str, Any]
    spec: QuantSpec
    source: PackedSource
    weights: dict[str, PackedWeight]
    others: list[str]

    @property
    def weights_only(self) -> bool:
        """Whether activations, keys and values stay in floating point."""
        return self.manifest.activation_bits == self.manifest.kv_cache_bits == UNQUANTIZED

    @property
    def bytes(self) -> int:
        """Of all its tensors."""
        return sum(path.stat().st_size for path in {one.path for one in self.source.stored})

    @cached_property
    def full_config(self) -> Any:
        """Configuration of the model, as transformers reads it, with all defaults."""
        return read_config(self.folder)

    @property
    def text_config(self) -> Any:
        """That of the language model."""
        return self.full_config.get_text_config(decoder=True)

    def shards(self) -> Iterator[list[str]]:
        """Yield, file by file, the names of quantized linears and of other tensors in it: what to hold at once."""
        files: dict[Path, list[str]] = {}
        for name, ones in self.source.by_name.items():
            module, _, leaf = name.rpartition(".")
            known = module if module in self.weights and leaf in _LEAVES else name
            held = files.setdefault(ones[0].path, [])
            if known not in held[-len(_LEAVES) :] and known not in held:
                held.append(known)
        yield from files.values()

    def published_name(self, name: str) -> str:
        """Return what published files call a tensor, or the module of a quantized linear."""
        if name not in self.weights:
            return self.source.published_name(name)
        return self.source.published_name(f"{name}{SCALE_SUFFIX}").removesuffix(SCALE_SUFFIX)


def open_packed(folder: Path) -> PackedModel:
    """Open a packed checkpoint, whose files are all hashed first.

    Args:
        folder: of the checkpoint.

    Raises:
        CheckpointError: not a checkpoint, unfinished, truncated or altered; its files contradict each other; or nothing
            in it is quantized.
    """
    manifest, config = verify_checkpoint(folder), read_json_object(folder / CONFIG)
    empty = skeleton(folder, manifest)
    source = PackedSource(folder, packed_names(empty), publish=published_packed_names(empty))
    headers = {name: header for held in source.shards().values() for name, header in held.values()}
    scales = [name for name in headers if name.endswith(SCALE_SUFFIX)]
    require_described(folder, config, manifest, headers[scales[0]].dtype if scales else None)
    spec = QuantSpec(**manifest.spec)
    modules = [name.removesuffix(SCALE_SUFFIX) for name in scales]
    weights = {name: PackedWeight(name, spec.of(name), *_shape(source, name), source) for name in modules}
    theirs = {f"{name}.{leaf}" for name in modules for leaf in _LEAVES}
    if not weights:
        raise CheckpointError(str(folder), "no quantized linear", "a packed model", "quantize the model first")
    return PackedModel(folder, manifest, config, spec, source, weights, [n for n in headers if n not in theirs])


def _shape(source: PackedSource, name: str) -> tuple[int, int]:
    rows, columns = source.read(f"{name}.weight_shape").tolist()
    return rows, columns
