"""The plan of a run beside what it took."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from eqat_mm.report.curves import peak_of
from eqat_mm.report.found import Stage, number, table
from eqat_mm.runtime.progress import duration, size


@dataclass(frozen=True)
class Beside:
    """One number of a plan, and what it came to.

    Attributes:
        what: it is a number of.
        planned: in words; None where no plan was recorded.
        measured: in words; None where nothing was measured.
        ratio: of the second to the first.
    """

    what: str
    planned: str | None
    measured: str | None
    ratio: float | None


def beside(stage: Stage) -> list[Beside]:
    """Return time and memory of a run, as planned and as measured."""
    return [row for row in _rows(stage) if row.planned is not None or row.measured is not None]


def _rows(stage: Stage) -> Iterator[Beside]:
    plan, record = table(stage.record.get("plan")), stage.record
    yield _row("time", number(plan.get("seconds")), stage.seconds, duration)
    yield _row("RAM at the peak", number(plan.get("ram")), number(record.get("peak_ram")) or _on_cpu(stage), size)
    if number(plan.get("gpu")) or not computed_on_cpu(stage):
        yield _row(
            "GPU memory at the peak", number(plan.get("gpu")), None if computed_on_cpu(stage) else peak_of(stage), size
        )


def _row(what: str, planned: float | None, measured: float | None, words: Callable[[Any], str]) -> Beside:
    ratio = measured / planned if planned and measured else None
    shown = [None if value is None else words(value) for value in (planned, measured)]
    return Beside(what, shown[0], shown[1], ratio)


def _on_cpu(stage: Stage) -> float | None:
    return peak_of(stage) if computed_on_cpu(stage) else None


def computed_on_cpu(stage: Stage) -> bool:
    """Whether a run computed without a GPU."""
    return table(stage.record.get("environment")).get("device") in ("cpu", None)
