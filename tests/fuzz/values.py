"""Values as JSON can hold them, the unlikely ones too."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import strategies as st

words = st.text(max_size=20) | st.text(st.characters(categories=["Cs", "Cc", "Lo", "Ps"]), max_size=5)
"""Text with halves of surrogate pairs and control characters."""

_leaves = st.none() | st.booleans() | st.integers() | st.floats() | words
json_values: st.SearchStrategy[Any] = st.recursive(
    _leaves, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(words, inner, max_size=4), max_leaves=8
)


def _nested(depth: int, opening: str) -> str:
    return opening * depth + "1" + {"[": "]", '{"a":': "}"}[opening] * depth


json_texts = st.one_of(
    json_values.map(json.dumps),
    json_values.map(json.dumps),
    st.builds(_nested, st.integers(850, 1050) | st.just(100_000), st.sampled_from(["[", '{"a":'])),
    st.integers(4000, 6000).map(lambda digits: "1" * digits),
    st.sampled_from(["NaN", "1e999", "[" * 100_000, '"', "\\ud800", "", "\ufeff[]"]),
)
"""Texts that are JSON, or nearly: deep, long, cut off."""
