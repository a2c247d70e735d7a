"""The repetition formulas on sequences counted by hand."""

from __future__ import annotations

import pytest

from eqat_eval.repetition import Repetition, repetition


@pytest.mark.parametrize(
    ("token_ids", "repeated_4grams", "distinct_2"),
    [
        ([1, 2, 3, 4, 5, 6], 0.0, 1.0),
        ([7] * 10, 1 - 1 / 7, 1 / 9),  # seven 4-grams, nine 2-grams, one of each
        ([1, 2, 1, 2, 1, 2], 1 - 2 / 3, 2 / 5),  # 1212 2121 1212; 12 21 12 21 12
        ([1, 2, 3, 4, 1, 2, 3, 4], 1 - 4 / 5, 4 / 7),
        ([5, 5, 5, 5], 0.0, 1 / 3),
    ],
)
def test_known_sequences(token_ids: list[int], repeated_4grams: float, distinct_2: float) -> None:
    score = repetition(token_ids)
    assert score.repeated_4grams == pytest.approx(repeated_4grams)
    assert score.distinct_2 == pytest.approx(distinct_2)


@pytest.mark.parametrize(
    ("token_ids", "expected"),
    [([], (None, None)), ([1], (None, None)), ([1, 1], (None, 1.0)), ([1, 1, 1], (None, 0.5))],
)
def test_too_short_is_unknown_and_not_good(token_ids: list[int], expected: tuple[float | None, float | None]) -> None:
    assert repetition(token_ids) == Repetition(*expected)
