"""How grids are used, along the blocks and by kind of linear: charts, and tables of shares."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from eqat_mm.report.charts import Line, Panel
from eqat_mm.report.grids import Grids, Linear, by_block, together

_LOW, _MIDDLE, _HIGH = 0.05, 0.5, 0.95
_BLOCK = "block"


@dataclass(frozen=True)
class Kind:
    """One kind of linear, over all blocks.

    Attributes:
        name: `mlp.up_proj`.
        count: number of linears.
        low: share of weights at the lowest code.
        high: share at the highest.
        information: bits that a code tells.
        border: share of zero points at the ends of their range; None on the symmetric grid.
        steps: step sizes below which 5, 50 and 95 % lie.
    """

    name: str
    count: int
    low: float
    high: float
    information: float
    border: float | None
    steps: tuple[float, float, float]


def kinds(parts: Sequence[Linear]) -> list[Kind]:
    """Return one row for each kind of linear, in the order in which blocks have them, and one for all."""
    names = list(dict.fromkeys(part.kind for part in parts))
    groups = [(name, [part for part in parts if part.kind == name]) for name in names]
    groups += [("all", list(parts))] if len(names) > 1 else []
    return [_kind(name, group) for name, group in groups]


def _kind(name: str, group: Sequence[Linear]) -> Kind:
    grids = together(group)
    low, middle, high = (grids.step(share) for share in (_LOW, _MIDDLE, _HIGH))
    return Kind(name, len(group), *grids.ends, grids.information, grids.border, (low, middle, high))


def panels(stages: Mapping[int, Sequence[Linear]]) -> list[list[Panel]]:
    """Return two charts along the blocks: saturation, and step sizes.

    Args:
        stages: the linears of each, by the key of its line.
    """
    along = {key: by_block(parts) for key, parts in stages.items()}
    ends = [Line(_points(blocks, lambda one: sum(one.ends)), key) for key, blocks in along.items()]
    border = [Line(_points(blocks, lambda one: one.border), key) for key, blocks in along.items()]
    steps = [_steps(blocks, key) for key, blocks in along.items()]
    information = [Line(_points(blocks, lambda one: one.information), key) for key, blocks in along.items()]
    return [
        [
            Panel("weights at the lowest or highest code", ends, _BLOCK, percent=True),
            Panel("zero points at either end of their range", border, _BLOCK, percent=True),
        ],
        [
            Panel("step size: median, and 5 to 95 %", steps, _BLOCK, log=True),
            Panel("bits of information in a code", information, _BLOCK),
        ],
    ]


def _points(blocks: Mapping[int, Grids], value: Callable[[Grids], float | None]) -> list[tuple[float, float]]:
    found = [(block + 1, value(grids)) for block, grids in blocks.items()]
    return [(block, share) for block, share in found if share is not None]


def _steps(blocks: Mapping[int, Grids], key: int) -> Line:
    band = [(grids.step(_LOW), grids.step(_HIGH)) for grids in blocks.values()]
    return Line([(block + 1, grids.step(_MIDDLE)) for block, grids in blocks.items()], key, band)
