"""The best choices within a budget, against all choices there are."""

from __future__ import annotations

import itertools
import random
import time

from hypothesis import given, settings
from hypothesis import strategies as st

from eqat_mm.quant.budget import Choice, Units, best_choices

CHOICES = st.builds(Choice, st.integers(0, 12), st.integers(-3, 40).map(float))
UNITS = st.lists(st.lists(CHOICES, min_size=1, max_size=4), min_size=1, max_size=6)


def totals(units: Units, picks: tuple[int, ...]) -> tuple[float, int]:
    """Damage and cost."""
    chosen = [unit[index] for unit, index in zip(units, picks, strict=True)]
    return sum(choice.damage for choice in chosen), sum(choice.cost for choice in chosen)


@settings(max_examples=100, deadline=None)
@given(UNITS, st.integers(0, 40))
def test_no_other_choices_within_the_budget_do_less_damage(units: Units, more: int) -> None:
    budget = sum(min(choice.cost for choice in unit) for unit in units) + more
    every = (totals(units, picks) for picks in itertools.product(*(range(len(unit)) for unit in units)))
    least = min(total for total in every if total[1] <= budget)
    damage, cost = totals(units, best_choices(units, budget))
    assert damage == least[0]
    assert cost <= budget


def test_of_a_large_model_within_a_second() -> None:
    """80 blocks of the sizes of a 70B model, with damages as they are measured: they fall by a factor at each bit."""
    draw = random.Random(0)
    sizes = [8192 * 10240, 8192 * 8192, 2 * 8192 * 28672, 28672 * 8192]
    units = []
    for weights in sizes * 80:
        damage = draw.lognormvariate(0, 2)
        units.append([Choice(weights * bits, damage * 4.0 ** -(bits + draw.random())) for bits in (2, 3, 4)])
    budget = round(2.5 * sum(sizes) * 80)
    started = time.process_time()
    damage, cost = totals(units, best_choices(units, budget))
    assert time.process_time() - started < 5
    assert 0.999 * budget < cost <= budget
    assert damage < totals(units, (0,) * len(units))[0] / 2
