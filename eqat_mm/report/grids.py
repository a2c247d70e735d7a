"""How the grids of a packed checkpoint are used: read tensor by tensor, a few megabytes at a time."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from eqat_kernels import unpack
from eqat_mm.blocks.weights import WeightSource
from eqat_mm.checkpoint.layout import PACKED_SUFFIX, SCALE_SUFFIX, SHAPE_SUFFIX
from eqat_mm.quant.spec import QuantSpec
from eqat_mm.runtime.progress import progress

_CODES_AT_ONCE = 2**22
_SIGN = 128
_LOWEST, _PER_OCTAVE, _RANGES = -16, 32, 512
"""Step sizes are counted in 1/32 octaves from 2^-16 to 2^0; what lies beyond, in the first and the last."""


@dataclass(frozen=True)
class Grids:
    """Of one linear, or of several together.

    Attributes:
        codes: how often each code is there, int64 [2^bits]; of several widths the most, and the highest code is last.
        zero_points: how often each zero point is there, int64 [2^bits]; all 0 on the symmetric grid.
        steps: how often a step size lies in each of the ranges of `step_middles`, int64.
    """

    codes: Tensor
    zero_points: Tensor
    steps: Tensor

    def __add__(self, other: Grids) -> Grids:
        zero_points = _joined(self.zero_points, other.zero_points)
        return Grids(_joined(self.codes, other.codes), zero_points, self.steps + other.steps)

    @property
    def weights(self) -> int:
        """Number of weights."""
        return int(self.codes.sum())

    @property
    def ends(self) -> tuple[float, float]:
        """Share of the weights at the lowest and at the highest code."""
        return int(self.codes[0]) / self.weights, int(self.codes[-1]) / self.weights

    @property
    def information(self) -> float:
        """Bits that a code tells: the entropy of their distribution."""
        share = self.codes[self.codes > 0].double() / self.weights
        return float(-(share * share.log2()).sum()) + 0.0

    @property
    def border(self) -> float | None:
        """Share of the zero points at either end of their range; None on the symmetric grid."""
        total = int(self.zero_points.sum())
        return int(self.zero_points[0] + self.zero_points[-1]) / total if total else None

    def step(self, share: float) -> float:
        """Return the absolute step size below which this share of all lies, to about a percent."""
        below = self.steps.cumsum(0).double() / self.steps.sum()
        return float(step_middles()[int((below >= share - 1e-12).nonzero()[0])])


def _joined(one: Tensor, other: Tensor) -> Tensor:
    """Return how often each code is there in both, the lowest with the lowest and the highest with the highest."""
    longest = max(len(one), len(other))
    first, second = (torch.cat([each[:-1], each.new_zeros(longest - len(each)), each[-1:]]) for each in (one, other))
    return first + second


@dataclass(frozen=True)
class Linear:
    """One quantized linear.

    Attributes:
        name: of its module.
        block: number in its name; None without.
        kind: the rest of the name behind the number, further numbers as `*`: `mlp.experts.*.up_proj`.
        grids: what is in it.
    """

    name: str
    block: int | None
    kind: str
    grids: Grids


def step_middles() -> Tensor:
    """Return the middles of the ranges in which step sizes are counted, float64."""
    middles: Tensor = 2 ** (_LOWEST + (torch.arange(_RANGES).double() + 0.5) / _PER_OCTAVE)
    return middles


def linears(folder: Path, spec: QuantSpec) -> Iterator[Linear]:
    """Read the quantized linears of a checkpoint, one after the other.

    Args:
        folder: of the checkpoint.
        spec: of its quantized linears.

    Raises:
        CheckpointError: a shard is missing or damaged.
    """
    source = WeightSource(folder)
    names = sorted(
        (name.removesuffix(SCALE_SUFFIX) for name in source.names() if name.endswith(SCALE_SUFFIX)), key=_key
    )
    for name in progress(names, what="grids", total=len(names), unit="linear"):
        yield Linear(name, *place_of(name), _grids(source, name, spec.of(name).bits))


def place_of(name: str) -> tuple[int | None, str]:
    """Return block and kind of a linear by its name, `model.layers.3.mlp.up_proj`."""
    found = re.match(r"(.*?)\.(\d+)\.(.+)", name)
    if found is None:
        return None, name
    return int(found[2]), re.sub(r"(?<=\.)\d+(?=\.)", "*", found[3])


def _key(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def _grids(source: WeightSource, name: str, bits: int) -> Grids:
    codes = torch.zeros(2**bits, dtype=torch.int64)
    for part in _codes(source, name, bits):
        codes += torch.bincount(part.flatten(), minlength=2**bits)
    scale = source.read(name + SCALE_SUFFIX)
    steps = scale.abs().float().clamp_min(1e-30).log2()
    place = ((steps - _LOWEST) * _PER_OCTAVE).floor().long().clamp(0, _RANGES - 1)
    zero_points = torch.zeros(2**bits, dtype=torch.int64)
    if f"{name}.weight_zero_point" in source:
        words = source.read(f"{name}.weight_zero_point").T.contiguous()
        zero_points += torch.bincount(unpack(words, bits, len(scale)).flatten(), minlength=2**bits)
    return Grids(codes, zero_points, torch.bincount(place.flatten(), minlength=_RANGES))


def _codes(source: WeightSource, name: str, bits: int) -> Iterator[Tensor]:
    """Yield the unsigned codes of a linear, some rows at a time."""
    if name + PACKED_SUFFIX not in source:  # whole bytes, signed
        for rows in source.read(f"{name}.weight").split(1024):
            yield rows.contiguous().view(torch.uint8) ^ _SIGN
        return
    width = int(source.read(name + SHAPE_SUFFIX)[1])
    for rows in source.read(name + PACKED_SUFFIX).split(max(1, _CODES_AT_ONCE // width)):
        yield unpack(rows.contiguous(), bits, width)


def together(parts: Sequence[Linear]) -> Grids:
    """Return the grids of several linears as one; there is at least one."""
    total = parts[0].grids
    for part in parts[1:]:
        total += part.grids
    return total


def by_block(parts: Sequence[Linear]) -> dict[int, Grids]:
    """Return the grids of each block, in their order."""
    blocks = sorted({part.block for part in parts if part.block is not None})
    return {block: together([part for part in parts if part.block == block]) for block in blocks}
