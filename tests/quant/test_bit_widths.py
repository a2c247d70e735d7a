"""Settings W-A-KV, as they are written."""

from __future__ import annotations

import pytest

from eqat_mm.errors import ConfigError
from eqat_mm.quant.bit_widths import BitWidths
from tests.checkpoint.files import assert_four_lines


@pytest.mark.parametrize("text", ["4-8-4", "4-8-8", "4-8-16", "4-6-16", "8-8-4", "8-8-8", "4-4-16"])
def test_the_settings_of_the_paper(text: str) -> None:
    widths = BitWidths.parse(text)
    assert widths.name == text
    assert [widths.weights, *widths.dynamic] == [int(part) for part in text.split("-")]


def test_activations_and_cache_are_not_quantized_by_default() -> None:
    assert BitWidths(4) == BitWidths.parse("4-16-16")


@pytest.mark.parametrize("text", ["", "4", "4-8", "4-8-8-8", "w4a8", "4-8-x", "-4-8-8", "4--8", f"4-8-{8:05000}"])
def test_what_is_not_three_numbers_is_refused(text: str) -> None:
    with pytest.raises(ConfigError) as raised:
        BitWidths.parse(text)
    assert_four_lines(raised.value)


@pytest.mark.parametrize(
    ("text", "part", "allowed"),
    [("16-8-8", "weights", "2, 3, 4, 8"), ("4-5-8", "activations", "4, 6, 8, 16"), ("4-8-6", "kv_cache", "4, 8, 16")],
)
def test_a_width_that_is_not_there_is_refused(text: str, part: str, allowed: str) -> None:
    with pytest.raises(ConfigError) as raised:
        BitWidths.parse(text)
    assert_four_lines(raised.value)
    assert raised.value.where == f"--bits, {part}"
    assert raised.value.allowed == allowed
