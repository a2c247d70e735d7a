"""Which conversations are held out."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eqat_mm.data.image_text.held_out import divided
from eqat_mm.errors import DataError
from tests.checkpoint.files import assert_four_lines


class Numbered(SimpleNamespace):
    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Any:
        return {"number": index}


def numbered(count: int) -> Any:
    return Numbered(
        lengths=[10 + index for index in range(count)], text_only=[index % 4 == 0 for index in range(count)]
    )


@given(count=st.integers(1, 60), share=st.floats(0, 0.99), seed=st.integers(0, 5))
def test_every_sample_is_on_one_side(count: int, share: float, seed: int) -> None:
    held_out = int(share * count)
    training, judged = divided(numbered(count), held_out, seed)
    assert len(judged) == held_out
    numbers = [[side[index]["number"] for index in range(len(side))] for side in (training, judged)]
    assert sorted(numbers[0] + numbers[1]) == list(range(count))
    assert numbers[0] == sorted(numbers[0])
    for side, own in zip((training, judged), numbers, strict=True):
        assert side.lengths == [10 + number for number in own]
        assert side.text_only == [number % 4 == 0 for number in own]


def test_the_draw_is_of_the_seed() -> None:
    drawn = [[divided(numbered(50), 5, seed)[1][index]["number"] for index in range(5)] for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize("held_out", [4, 5])
def test_something_is_left_to_train_on(held_out: int) -> None:
    with pytest.raises(DataError, match="0 to 3") as raised:
        divided(numbered(4), held_out, seed=0)
    assert_four_lines(raised.value)
