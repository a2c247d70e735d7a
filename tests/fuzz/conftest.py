"""How many cases a fuzz test tries: a few, always the same; with EQAT_FUZZ_EXAMPLES=N as many, new ones every time."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

_ASKED = os.environ.get("EQAT_FUZZ_EXAMPLES")

settings.register_profile(
    "fuzz",
    max_examples=int(_ASKED or 60),
    derandomize=_ASKED is None,
    database=None,
    deadline=None,  # of the machine, not of the reader; what hangs is ended by `_within`
    print_blob=True,
    suppress_health_check=list(HealthCheck),
)
settings.load_profile("fuzz")


@pytest.fixture(autouse=True)
def _no_warning_is_an_error() -> Iterator[None]:
    """Readers warn about odd data, as they do for users; as errors these would hide what comes behind."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
