"""The best choice for each of several units within a budget, exactly: the multiple-choice knapsack problem.

At a price per bit each unit takes the choice with the least damage and price by itself. The price at which the bits
just fit gives two bounds: the best is no worse than its choices, and from any unit on, damage and price are at least
theirs. Then units are added one by one. Of the sums so far those are kept that no other beats in both damage and bits,
and that may still end below the choices known: few.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

_HALVINGS = 100
_ROUNDING = 1e-9
"""Share of a sum of damages by which another order of its terms may change it."""


class Choice(NamedTuple):
    """One of the things that a unit may be.

    Attributes:
        cost: bits that it takes.
        damage: what it does to the model, finite.
    """

    cost: int
    damage: float


class _Sum(NamedTuple):
    """Of the first units: bits, damage, and which choices these are."""

    cost: int
    damage: float
    picks: tuple[int, ...]


Units = Sequence[Sequence[Choice]]


def best_choices(units: Units, budget: int) -> tuple[int, ...]:
    """Return the number of the choice of each unit, so that the sum of damages is least within the budget.

    Args:
        units: choices of each, one at least.
        budget: bits; the cheapest choices together fit.
    """
    price, known = _priced(units, budget)
    assert known.cost <= budget, "asked before"
    highest = known.damage + _ROUNDING * sum(max(abs(choice.damage) for choice in unit) for unit in units)
    cheapest = _sums_behind(units, lambda choice: choice.cost)
    least = _sums_behind(units, lambda choice: choice.damage + price * choice.cost)
    sums = [_Sum(0, 0.0, ())]
    for unit, bits, bound in zip(units, cheapest, least, strict=True):
        longer = [
            _Sum(one.cost + choice.cost, one.damage + choice.damage, (*one.picks, index))
            for one in sums
            for index, choice in enumerate(unit)
        ]
        sums = _unbeaten(
            one
            for one in longer
            if one.cost + bits <= budget and one.damage + bound - price * (budget - one.cost) <= highest
        )
    return sums[-1].picks


def _unbeaten(sums: Iterable[_Sum]) -> list[_Sum]:
    """Return those with less damage than all that cost less, by cost."""
    kept: list[_Sum] = []
    for one in sorted(sums):
        if not kept or one.damage < kept[-1].damage:
            kept.append(one)
    return kept


def _priced(units: Units, budget: int) -> tuple[float, _Sum]:
    """Return the least price at which what units take by themselves fits, and that."""
    damages = [choice.damage for unit in units for choice in unit]
    low, high = 0.0, max(damages) - min(damages) + 1.0  # at which a bit costs more than any damage
    if _taken(units, low).cost <= budget:
        return low, _taken(units, low)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if _taken(units, middle).cost <= budget else (middle, high)
    return high, _taken(units, high)


def _taken(units: Units, price: float) -> _Sum:
    picks = tuple(
        min(range(len(unit)), key=lambda index: (unit[index].damage + price * unit[index].cost, unit[index].cost))
        for unit in units
    )
    chosen = [unit[index] for unit, index in zip(units, picks, strict=True)]
    return _Sum(sum(choice.cost for choice in chosen), sum(choice.damage for choice in chosen), picks)


def _sums_behind(units: Units, of: Callable[[Choice], float]) -> list[float]:
    """Return for each unit the sum of the least `of` over all units behind it."""
    sums = [0.0]
    for unit in reversed(units[1:]):
        sums.append(sums[-1] + min(map(of, unit)))
    return sums[::-1]
