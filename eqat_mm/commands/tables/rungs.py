"""Rungs of a ladder of stages: models made in turn, each measured on the same tokens, one table of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from eqat_mm.commands.plumbing.runs import model_fingerprint, seconds_of
from eqat_mm.commands.tables.table import Row, Table
from eqat_mm.commands.verbs.evaluate import HEADINGS, Bench, numbers
from eqat_mm.quant.spec import QuantSpec
from eqat_mm.runtime.progress import say

_BESIDE = 24
"""Width of a column."""


class Rungs:
    """Makes and measures each rung; a rung that was measured before is not measured again.

    Args:
        bench: measures them.
        root: folder of the notes, `eval`, and of the table, `results.json`.
        command: that makes them.
        model: full-precision model, as it is named.
        spec: of its packed weights.
        made_by: provenance of the table.
        anew: measure each again.
        beside: measure them on texts of another kind, by the names of these.
    """

    def __init__(
        self,
        bench: Bench,
        root: Path,
        command: str,
        model: str,
        spec: QuantSpec,
        made_by: dict[str, Any],
        *,
        anew: bool,
        beside: Mapping[str, Bench] | None = None,
    ) -> None:
        head = {"model": model, "bits": spec.bits, "group_size": spec.group_size}
        self.bench, self.root, self.beside = bench, root, beside or {}
        self._table = Table(root, command, lambda rows: head | bench.results(rows, made_by), table, anew=anew)

    @property
    def rows(self) -> list[Row]:
        """Of the table so far."""
        return self._table.rows

    def add(self, stage: str, make: Callable[[], Path]) -> Path:
        """Make the checkpoint of a rung, evaluate it, print and save the table so far; return its folder."""
        say(f"== {stage}")
        folder = make()
        decides = self.bench.decides | {"model": model_fingerprint(folder)}
        if self.beside:
            decides["beside"] = {name: bench.decides for name, bench in self.beside.items()}
        more = {"seconds": round(seconds_of(folder), 1)}
        self._table.add(stage, decides, lambda: self._measured(folder), lambda row: {"stage": stage} | row | more)
        return folder

    def _measured(self, folder: Path) -> Row:
        row = self.bench.row(folder)
        if self.beside:
            found = {name: bench.row(folder) for name, bench in self.beside.items()}
            row["beside"] = {name: {"perplexity": each["perplexity"], "kl": each["kl"]} for name, each in found.items()}
        return row


def table(rows: list[Row]) -> str:
    """Return rows as lines of text below headings: perplexity, and behind a slash KL, on texts of another kind."""
    names = rows[0].get("beside", {})
    headings = f"{'stage':<20}{HEADINGS}" + "".join(f"{name:>{_BESIDE}}" for name in names)
    return "\n".join([headings, *(f"{row['stage']:<20}{numbers(row)}{_beside(row)}" for row in rows)])


def _beside(row: Row) -> str:
    texts = (f"{each['perplexity']:,.2f} / {each['kl']:.4f}" for each in row.get("beside", {}).values())
    return "".join(f"{text:>{_BESIDE}}" for text in texts)
