"""How transformers' own `from_pretrained` reads our folders: as packed models, or as it does without this package."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

STOCK = "EQAT_FROM_PRETRAINED"
"""Environment variable; `dense` is transformers' own way."""


def reads_densely() -> bool:
    """Whether transformers' own way is asked for."""
    return os.environ.get(STOCK) == "dense"


@contextmanager
def stock_reader() -> Iterator[None]:
    """Let transformers read our folders in its own way, as those see them who do not have this package."""
    before = os.environ.get(STOCK)
    os.environ[STOCK] = "dense"
    try:
        yield
    finally:
        os.environ.pop(STOCK)
        os.environ.update({STOCK: before} if before is not None else {})
