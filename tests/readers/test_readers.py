"""Every engine reads our folders as the table in docs/formats.md says; each runs in an environment of its own."""

from __future__ import annotations

import itertools

import pytest

from tests.readers import survey, table
from tests.readers.cases import READERS, Case, cases
from tests.readers.table import Seen

KNOWN = {one.key: one for one in table.read()}
ASKED = {
    name: [case for case in group if " ".join(case) in KNOWN]
    for name, group in itertools.groupby(cases(), key=lambda case: case[2])
}


@pytest.mark.readers
@pytest.mark.network
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", READERS)
def test_a_reader_makes_of_our_folders_what_the_table_says(name: str) -> None:
    wanted: list[Case] = ASKED[name]
    found = {one.key: one for one in survey.seen(name, wanted)}
    assert list(found) != []
    assert {key: wrong for key, one in found.items() if (wrong := departures(KNOWN[key], one))} == {}


def departures(known: Seen, now: Seen) -> list[str]:
    """Return what is not as the table has it; rounding on another processor is."""
    if (now.refused is None) != (known.refused is None):
        return [f"refused: {now.refused}"]
    wrong = []
    if known.kl is not None and not (now.kl is not None and now.kl < max(2 * known.kl, table.EXACT)):
        wrong.append(f"KL {now.kl}")
    if known.perplexity is not None and now.perplexity != pytest.approx(known.perplexity, rel=1e-2):
        wrong.append(f"perplexity {now.perplexity}")
    if known.written == known.tokens and now.written != now.tokens:
        wrong.append(f"{now.written} of {now.tokens} tokens")
    if known.reloaded is not None and not (now.reloaded is not None and (now.reloaded < 0) == (known.reloaded < 0)):
        wrong.append(f"saves it: {now.reloaded}")
    return wrong


def test_what_departs_from_the_table() -> None:
    known = Seen("m", "w2g64", "r", kl=2e-4, perplexity=14.0, written=8, tokens=8, reloaded=0.0)
    assert departures(known, known) == []
    assert departures(known, Seen("m", "w2g64", "r", "no kernel")) == ["refused: no kernel"]
    other = Seen("m", "w2g64", "r", kl=5e-4, perplexity=15.0, written=7, tokens=8, reloaded=-1.0)
    assert departures(known, other) == ["KL 0.0005", "perplexity 15.0", "7 of 8 tokens", "saves it: -1.0"]
