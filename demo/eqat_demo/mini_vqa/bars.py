"""Bar charts: three to six bars, each in a column of the grid and of a colour of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import permutations
from random import Random

from eqat_demo.mini_vqa.asked import Asked
from eqat_demo.mini_vqa.scenes import COLOURS, GRID

HEIGHTS = range(10, 95, 5)
"""How high a bar may be: in pixels, and as it is answered."""

VALUE, RANK = "bar_value", "bar_rank"
"""The two families of questions."""


@dataclass(frozen=True)
class Bar:
    """One bar."""

    colour: str
    height: int
    column: int


@dataclass(frozen=True)
class Chart:
    """Bars, from left to right, no two of one colour or height."""

    bars: tuple[Bar, ...]


def random_chart(random: Random) -> Chart:
    """Draw a chart."""
    count = random.randint(3, GRID)
    columns = sorted(random.sample(range(GRID), count))
    of = zip(random.sample(COLOURS, count), random.sample(HEIGHTS, count), columns, strict=True)
    return Chart(tuple(Bar(*each) for each in of))


def values(chart: Chart, random: Random) -> Iterator[Asked]:
    """How high is a bar?"""
    for bar in chart.bars:
        yield Asked(VALUE, VALUE, f"How high is the {bar.colour} bar?", str(bar.height))


def ranks(chart: Chart, random: Random) -> Iterator[Asked]:
    """Which bar is the highest or the lowest, and is one higher than another?"""
    ordered = sorted(chart.bars, key=lambda bar: bar.height)
    for words, bar in (("lowest", ordered[0]), ("highest", ordered[-1])):
        yield Asked(RANK, f"{RANK}/{words}", f"Which bar is the {words}?", bar.colour)
    for one, other in permutations(chart.bars, 2):
        answer = "yes" if one.height > other.height else "no"
        yield Asked(RANK, f"{RANK}/higher", f"Is the {one.colour} bar higher than the {other.colour} bar?", answer)


FAMILIES: dict[Callable[[Chart, Random], Iterator[Asked]], int] = {values: 4, ranks: 2}
"""The families, and how many questions of each a chart is asked."""
