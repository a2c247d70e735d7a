"""Scenes: three to five things of some shape, colour and size, no two in one row or column of the grid.

A picture is 96 pixels wide and high, six squares of 16 in either direction. x grows to the right, y downwards.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from random import Random

GRID, SQUARE = 6, 16
SIDE = GRID * SQUARE
"""Pixels of a picture, in either direction."""

SHAPES = ("circle", "square", "triangle", "cross")
COLOURS = ("black", "blue", "green", "purple", "red", "yellow")
SIZES = ("small", "large")
ATTRIBUTES = ("size", "colour", "shape")
VALUES = dict(zip(ATTRIBUTES, (SIZES, COLOURS, SHAPES), strict=True))

RADIUS = {"small": 4, "large": 7}
"""Half of a thing's width, in pixels."""

_SHIFT = {"small": 3, "large": 0}  # from the middle of its square: at most this far, so that it stays within
_FEWEST, _MOST = 3, 5


@dataclass(frozen=True)
class Thing:
    """One thing; `x` and `y` are its middle, in pixels."""

    size: str
    colour: str
    shape: str
    x: int
    y: int

    @property
    def square(self) -> tuple[int, int]:
        """Row and column of the square that it lies in."""
        return self.y // SQUARE, self.x // SQUARE

    def distance(self, other: Thing) -> float:
        """Return the distance of the middles, in pixels."""
        return math.hypot(self.x - other.x, self.y - other.y)


@dataclass(frozen=True)
class Scene:
    """What is on a picture."""

    things: tuple[Thing, ...]


def random_scene(random: Random) -> Scene:
    """Draw a scene. Its things share few colours and shapes, so that there is something to count."""
    count = random.randint(_FEWEST, _MOST)
    colours = random.sample(COLOURS, random.choice((1, 2, 3, 3, 4)))
    shapes = random.sample(SHAPES, random.choice((1, 2, 2, 3, 4)))
    rows, columns = (random.sample(range(GRID), count) for _ in range(2))
    return Scene(tuple(_thing(random, colours, shapes, *place) for place in zip(rows, columns, strict=True)))


def _thing(random: Random, colours: list[str], shapes: list[str], row: int, column: int) -> Thing:
    size = random.choice(SIZES)
    x, y = (SQUARE * at + SQUARE // 2 + random.randint(-_SHIFT[size], _SHIFT[size]) for at in (column, row))
    return Thing(size, random.choice(colours), random.choice(shapes), x, y)
