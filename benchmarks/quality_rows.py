"""The rows of the table of `quality.py`: which methods, at which widths, on how much text, with which seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

FULL_PRECISION = "full-precision"
ROUNDING = "rtn"
SPECS = ("w4g64", "w4g32", "w3g64", "w2g64")
BUDGETS = (192, 2400)
"""Windows that a method may see. The smaller number is the first windows of the larger one."""
LENGTH = 256
"""Tokens of a window."""
SEEDS = (0, 1)


@dataclass(frozen=True)
class Method:
    """A way to make a model.

    Attributes:
        title: in the table.
        peer: environment that it runs in, and name of its script; empty for this project's own commands.
        options: of the script; of this project's commands whether the grid is `symmetric`.
        reads: text. Without, there is one row for all budgets.
        draws: random numbers that its result depends on. Without, there is one row for all seeds.
    """

    title: str
    peer: tuple[str, str] | None = None
    options: dict[str, Any] = field(default_factory=dict)
    reads: bool = True
    draws: bool = False


METHODS: dict[str, Method] = {
    FULL_PRECISION: Method("full precision", reads=False),
    ROUNDING: Method("round-to-nearest", reads=False),
    "hqq": Method("HQQ", ("hqq", "by_hqq"), reads=False),
    "gptq": Method("GPTQ", ("llm-compressor", "by_llm_compressor"), {"method": "gptq"}),
    "awq": Method("AWQ", ("llm-compressor", "by_llm_compressor"), {"method": "awq"}),
    "ours": Method("ours", draws=True),
    "ours-symmetric": Method("ours, symmetric grid", options={"symmetric": True}, draws=True),
    "paper": Method("EfficientQAT, published settings"),
    "auto-round": Method("auto-round", ("auto-round", "by_auto_round"), {"iters": 200, "sym": True}, draws=True),
    "auto-round-best": Method(
        "auto-round, best", ("auto-round", "by_auto_round"), {"iters": 1000, "sym": True}, draws=True
    ),
    "auto-round-best-asym": Method(
        "auto-round, best, asymmetric", ("auto-round", "by_auto_round"), {"iters": 1000, "sym": False}, draws=True
    ),
}
"""In the order of their cost."""


@dataclass(frozen=True)
class Row:
    """One model of the table.

    Attributes:
        method: key of `METHODS`.
        spec: width and group size; empty in full precision.
        windows: that it may see; 0 where it reads none.
        seed: of what it draws.
    """

    method: str
    spec: str = ""
    windows: int = 0
    seed: int = 0

    @property
    def key(self) -> str:
        """Return its name, in words."""
        seen = f"{self.windows}x{LENGTH}" if self.windows else ""
        seed = f"seed-{self.seed}" if METHODS[self.method].draws else ""
        return " ".join(word for word in (self.method, self.spec, seen, seed) if word)

    @property
    def bits(self) -> int:
        """Return bits of a weight; 0 in full precision."""
        return int(self.spec[1]) if self.spec else 0

    @property
    def group_size(self) -> int:
        """Return weights that share a step size."""
        return int(self.spec.partition("g")[2])


def rows_of(
    methods: Sequence[str], specs: Sequence[str], budgets: Sequence[int] = BUDGETS, seeds: Sequence[int] = SEEDS
) -> list[Row]:
    """Return the rows of some methods, cheap ones first, the smaller budget before the larger one."""
    found: dict[Row, None] = {}
    for name in (name for name in METHODS if name in methods):
        method = METHODS[name]
        for windows, spec, seed in product(budgets, ("",) if name == FULL_PRECISION else specs, seeds):
            found[Row(name, spec, windows * method.reads, seed * method.draws)] = None
    return list(found)
