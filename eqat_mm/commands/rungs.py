"""Rungs of a ladder of stages: models made in turn, each measured on the same tokens, one table of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from eqat_mm.commands.evaluate import HEADINGS, Bench, numbers
from eqat_mm.commands.runs import model_fingerprint, noted, seconds_of, slug
from eqat_mm.quant.spec import QuantSpec
from eqat_mm.runtime.files import write_json
from eqat_mm.runtime.progress import say


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

    Attributes:
        rows: of the table so far.
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
    ) -> None:
        self.bench, self.root, self.command, self.anew = bench, root, command, anew
        self.head = {"model": model, "bits": spec.bits, "group_size": spec.group_size}
        self.made_by = made_by
        self.rows: list[dict[str, Any]] = []

    def add(self, stage: str, make: Callable[[], Path]) -> Path:
        """Make the checkpoint of a rung, evaluate it, print and save the table so far; return its folder."""
        say(f"== {stage}")
        folder = make()
        place, decides = self.root / "eval" / slug(stage), self.bench.decides | {"model": model_fingerprint(folder)}
        row = noted(place, self.command, decides, lambda: self.bench.row(folder), anew=self.anew)
        self.rows.append({"stage": stage} | row | {"seconds": round(seconds_of(folder), 1)})
        write_json(self.root / "results.json", self.head | self.bench.results(self.rows, self.made_by))
        say(table(self.rows))
        return folder


def table(rows: list[dict[str, Any]]) -> str:
    """Return rows as lines of text below headings."""
    return "\n".join([f"{'stage':<20}{HEADINGS}", *(f"{row['stage']:<20}{numbers(row)}" for row in rows)])
