"""The table of docs/formats.md is the one that the readers wrote."""

from __future__ import annotations

import pytest

from tests.readers import table
from tests.readers.table import Seen

NOISY = ("llama.cpp", "gptqmodel", "transformers 5.23, gptqmodel", "vLLM")
"""Readers that do not compute in float32: rounding grows without bounds in what is no model at 2 bits."""


def test_the_page_has_what_was_seen() -> None:
    page = table.PAGE.read_text(encoding="utf-8")
    assert page.count(table.BEGIN) == page.count(table.END) == 1
    written = page.partition(table.BEGIN)[2].partition(table.END)[0]
    assert written == table.text(table.read())


def test_nothing_is_read_as_another_model() -> None:
    """A folder is read, or refused: nobody makes random weights of it."""
    seen = [one for one in table.read() if not (one.reader.startswith(NOISY) and one.spec.startswith("w2"))]
    assert seen
    assert [one.key for one in seen if one.kl is not None and one.kl > 0.5] == []
    assert [one.key for one in seen if one.agreement is not None and one.agreement < 0.8] == []


@pytest.mark.parametrize(
    ("seen", "said"),
    [
        ({"kl": 3e-9, "written": 8, "tokens": 8, "reloaded": 0.0}, "exact"),
        ({"kl": 2.4e-4, "written": 8, "tokens": 8}, "KL 2e-04"),
        ({"kl": 2.4e-4, "written": 3, "tokens": 8}, "KL 2e-04, 3 of 8 tokens"),
        ({"perplexity": 14.4, "ours": 14.3, "written": 8, "tokens": 8, "apart": 0.1}, "perplexity +0.70%"),
        ({"written": 2, "tokens": 2, "apart": 0.012}, "within 0.01 nats"),
        ({"kl": 0.0, "written": 8, "tokens": 8, "reloaded": 0.5}, "exact, another one after saving"),
        ({"kl": 0.0, "written": 8, "tokens": 8, "reloaded": -1.0}, "exact, does not save and load it"),
        ({"written": 8, "tokens": 8}, "the same text"),
    ],
)
def test_what_is_said_of_a_case(seen: dict[str, float], said: str) -> None:
    assert table.cell(Seen("m", "w2g64", "r", **seen)) == said  # type: ignore[arg-type]


def test_reasons_of_refusals_are_numbered_below() -> None:
    why = (("a", "no kernel"), ("b", "not run here: no GPU"))
    seen = [Seen("m", "w2g64", name, refused=reason) for name, reason in why]
    assert table.text([*seen, Seen("m", "w4g64", "b", kl=0.0)]).splitlines() == [
        "| m | w2g64 | w4g64 |",
        "|---|---|---|",
        "| a | refused (1) |  |",
        "| b | not run (2) | exact |",
        "",
        "(1) `no kernel`  ",
        "(2) `not run here: no GPU`  ",
    ]


def test_the_reason_is_the_last_error() -> None:
    lines = ["Traceback", "ValueError: first", "During handling", "RuntimeError: the  second", "please report it"]
    assert table.reason_in(lines) == "RuntimeError: the second"
    assert table.reason_in(["killed"]) == "killed"
    assert table.reason_in([]) == ""
