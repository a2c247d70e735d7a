"""The factor on every learning rate."""

from __future__ import annotations

import pytest

from eqat_mm.train.schedule import cosine_factor


def test_warm_up_rises_in_equal_steps_to_the_peak() -> None:
    factors = [cosine_factor(step, 10, warmup=3) for step in range(4)]
    assert factors == pytest.approx([0.25, 0.5, 0.75, 1.0])


def test_the_decay_is_half_a_cosine_to_the_floor() -> None:
    factors = [cosine_factor(step, 8, floor=0.1) for step in range(9)]
    assert factors[0] == 1.0
    assert factors[4] == pytest.approx(0.55)
    assert factors[8] == pytest.approx(0.1)
    assert factors == sorted(factors, reverse=True)


def test_steps_behind_the_last_stay_on_the_floor() -> None:
    assert cosine_factor(50, 8, floor=0.1) == pytest.approx(0.1)


def test_a_single_step_is_taken_at_the_peak() -> None:
    assert cosine_factor(0, 1) == 1.0
