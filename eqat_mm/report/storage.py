"""What a packed checkpoint stores, by the headers of its files: bits by layer, bytes by part."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from eqat_mm.blocks.stored import Stored
from eqat_mm.blocks.weights import WeightSource
from eqat_mm.checkpoint.adapters import adapter_bits
from eqat_mm.checkpoint.layout import PACKED_LEAVES, PACKED_SUFFIX, SCALE_SUFFIX, SHAPE_SUFFIX
from eqat_mm.report.grids import place_of

QUANTIZED = "quantized"
PARTS = ("codes", "step sizes", "zero points", "not quantized")
"""What bytes are, in the order of `Layer.stored`."""
_CODES, _STEPS, _ZEROS, _KEPT = range(4)
_PLACES = {"weight_packed": _CODES, "weight": _CODES, "weight_scale": _STEPS, "weight_zero_point": _ZEROS}


@dataclass(frozen=True)
class Layer:
    """All linears of one kind, or all tensors of one part that is not quantized.

    Attributes:
        name: of the kind or of the part.
        form: `quantized`, or the dtypes that are stored.
        weights: number of them.
        stored: bytes of each of `PARTS`.
        count: number of modules.
    """

    name: str
    form: str
    weights: int = 0
    stored: tuple[int, ...] = (0, 0, 0, 0)
    count: int = 0

    @property
    def bytes(self) -> int:
        """All bytes."""
        return sum(self.stored)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight."""
        return 8 * self.bytes / self.weights if self.weights else 0.0


def layers_of(folder: Path) -> list[Layer]:
    """Return what the checkpoint stores, largest part first.

    Raises:
        CheckpointError: a file is missing or truncated.
    """
    source = WeightSource(folder)
    layers: dict[tuple[str, str], Layer] = {}
    for one, name, form, part in _placed(source):
        layer = layers.get((name, form), Layer(name, form))
        stored = [*layer.stored]
        stored[part] += math.prod(one.shape) * _width(one)
        counts = part in (_CODES, _KEPT)
        weights = _weights(source, one, form) if counts else 0
        layers[name, form] = Layer(name, form, layer.weights + weights, tuple(stored), layer.count + counts)
    return sorted(layers.values(), key=lambda layer: -layer.bytes)


def bits_per_weight(folder: Path, layers: list[Layer]) -> float | None:
    """Return the stored bits per quantized weight, with low-rank adapters; None where nothing is quantized."""
    quantized = [layer for layer in layers if layer.form == QUANTIZED]
    weights = sum(layer.weights for layer in quantized)
    return (8 * sum(layer.bytes for layer in quantized) + adapter_bits(folder)) / weights if weights else None


def _placed(source: WeightSource) -> Iterator[tuple[Stored, str, str, int]]:
    """Yield each tensor with the name and form of its layer, and the place of its bytes in `Layer.stored`."""
    for one in source.stored:
        module, _, leaf = one.name.rpartition(".")
        packed = module + SCALE_SUFFIX in source
        if packed and leaf in _PLACES:
            yield one, place_of(module)[1], QUANTIZED, _PLACES[leaf]
        elif not packed or leaf not in PACKED_LEAVES:  # but for the shape, which is 16 bytes
            yield one, _part(module or one.name), one.dtype, _KEPT


def _part(module: str) -> str:
    """Return the part of the model that a module which is not quantized belongs to."""
    sees = re.match(r"(?:[^.]*\.)*?[^.]*(?:vision|visual|image|projector)[^.]*", module)
    return sees[0] if sees else place_of(module)[1]


def _weights(source: WeightSource, one: Stored, form: str) -> int:
    shape = one.name.removesuffix(PACKED_SUFFIX) + SHAPE_SUFFIX
    return math.prod(source.read(shape).tolist() if form == QUANTIZED and shape in source else one.shape)


def _width(one: Stored) -> int:
    """Return bytes of one number, by the name of its dtype: F32, BF16, I8, F8_E4M3, BOOL."""
    bits = re.search(r"\d+", one.dtype)
    return int(bits[0]) // 8 if bits else 1
