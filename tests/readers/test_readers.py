"""Every engine reads our folders as the table in docs/formats.md says; each runs in an environment of its own."""

from __future__ import annotations

import pytest

from tests.readers import survey, table

KNOWN = {one.key: one for one in table.read()}


@pytest.mark.readers
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("case", [case for case in survey.cases() if " ".join(case) in KNOWN], ids=" ".join)
def test_a_reader_makes_of_a_folder_what_the_table_says(case: tuple[str, str, str]) -> None:
    known, one = KNOWN[" ".join(case)], survey.seen(*case)
    assert (one.refused is None) == (known.refused is None), one
    if known.kl is not None:
        assert one.kl is not None
        assert one.kl < max(2 * known.kl, table.EXACT), one
    if known.perplexity is not None:
        assert one.perplexity == pytest.approx(known.perplexity, rel=1e-2)
    if known.written == survey.NEW:
        assert one.written is not None
        assert one.written >= survey.NEW // 2, one
    if known.reloaded is not None:
        assert one.reloaded is not None
        assert (one.reloaded < 0) == (known.reloaded < 0), one
        assert one.reloaded < 1e-3, one
