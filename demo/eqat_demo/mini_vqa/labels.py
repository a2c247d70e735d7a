"""What each square of a picture shows, as numbers: what a vision tower is taught.

Axes: P squares of a picture, row by row; L labels of each.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import singledispatch
from string import ascii_lowercase

import torch
from torch import Tensor

from eqat_demo.mini_vqa.bars import Chart
from eqat_demo.mini_vqa.scenes import COLOURS, GRID, SHAPES, SIZES, SQUARE, Scene
from eqat_demo.mini_vqa.words import Written

NOTHING = ""
KINDS = {
    "colour": (NOTHING, *COLOURS),
    "shape": (NOTHING, *SHAPES),
    "size": (NOTHING, *SIZES),
    "left letter": (NOTHING, *ascii_lowercase),
    "right letter": (NOTHING, *ascii_lowercase),
    "height": (NOTHING, *map(str, range(1, SQUARE + 1))),
}
"""What is told of a square, and the values that it may have; the height is that of the piece of a bar in it."""

Shown = dict[str, str]
Square = tuple[int, int]


def labels_of(content: object) -> Tensor:
    """Return the index of each value of `KINDS` in each square: int64 [P, L]."""
    shown: dict[Square, Shown] = {}
    for square, what in squares_of(content):
        shown.setdefault(square, {}).update(what)
    rows = [shown.get(divmod(place, GRID), {}) for place in range(GRID * GRID)]
    return torch.tensor([[values.index(row.get(kind, NOTHING)) for kind, values in KINDS.items()] for row in rows])


@singledispatch
def squares_of(content: object) -> Iterator[tuple[Square, Shown]]:
    """Yield the squares that show something, by row and column, and what they show."""
    raise AssertionError(content)


@squares_of.register
def _scene(content: Scene) -> Iterator[tuple[Square, Shown]]:
    for thing in content.things:
        yield thing.square, {"colour": thing.colour, "shape": thing.shape, "size": thing.size}


@squares_of.register
def _chart(content: Chart) -> Iterator[tuple[Square, Shown]]:
    for bar in content.bars:
        for row in range(GRID):
            piece = min(SQUARE, bar.height - SQUARE * (GRID - 1 - row))
            if piece > 0:
                yield (row, bar.column), {"colour": bar.colour, "height": str(piece)}


@squares_of.register
def _word(content: Written) -> Iterator[tuple[Square, Shown]]:
    for place, letter in enumerate(content.word, content.column):
        side = "right letter" if place % 2 else "left letter"
        yield (content.row, place // 2), {"colour": content.colour, side: letter}
