"""What a run has logged, as lines to draw."""

from __future__ import annotations

from collections.abc import Sequence

from eqat_mm.report.charts import Line, Panel, Points
from eqat_mm.report.found import Record, Stage, number

_BLOCK, _STEP = "block", "step"


def points(records: Sequence[Record], x: str, y: str, shift: float = 0) -> list[tuple[float, float]]:
    """Return the points of all records that have both numbers.

    Args:
        records: lines of `metrics.jsonl`.
        x: name of one number.
        y: name of the other.
        shift: added to x.
    """
    pairs = [(number(record.get(x)), number(record.get(y))) for record in records]
    return [(first + shift, second) for first, second in pairs if first is not None and second is not None]


def block_panels(records: Sequence[Record]) -> list[Panel]:
    """Return loss before and after training, and relative error, of each block of Block-AP."""
    before, after = (positive(points(records, "block", f"loss_{when}", 1)) for when in ("before", "after"))
    error = points(records, "block", "relative_error", 1)
    lines = [Line(before, 1, dots=True), Line(after, 0, dots=True)]
    return [
        Panel("loss on held-out samples, before and after", lines, _BLOCK, log=True, wide=1.4),
        Panel("relative error after training", [Line(error, 0, dots=True)], _BLOCK),
    ]


def step_panels(records: Sequence[Record]) -> list[Panel]:
    """Return loss, held-out loss, gradient norm and learning rate along the steps of an end-to-end trainer."""
    loss = [Line(points(records, "step", "loss"), 0), Line(points(records, "step", "held_out_loss"), 1, dots=True)]
    norm, rate = points(records, "step", "grad_norm"), points(records, "step", "learning_rate")
    kl = points(records, "step", "held_out_kl")
    return [
        Panel("loss", loss, _STEP, wide=1.6),
        Panel("KL on held-out samples", [Line(kl, 1, dots=True)], _STEP),
        Panel("gradient norm", [Line(positive(norm), 2)], _STEP, log=True),
        Panel("learning rate", [Line(rate, 3)], _STEP),
    ]


def positive(given: Points) -> list[tuple[float, float]]:
    """Return the points above zero: a logarithmic axis has no others."""
    return [point for point in given if point[1] > 0]


def peak_of(stage: Stage) -> float | None:
    """Return the largest `peak_bytes` of a run: memory of the GPU, or of the process on a CPU."""
    peaks = [number(record.get("peak_bytes")) for record in stage.metrics]
    return max((peak for peak in peaks if peak is not None), default=None)


def totals(stage: Stage) -> list[tuple[str, str]]:
    """Return what can be said of the whole of a log, as pairs of name and words."""
    records = stage.metrics
    tokens = [number(record.get("tokens")) for record in records if "block" in record]
    rates = sorted(rate for _, rate in points(records, "step", "tokens_per_second"))
    skipped = sum(number(record.get("skipped")) or 0 for record in records)
    retries = sum(number(record.get("retries")) or 0 for record in records)
    found = [("blocks", f"{len(tokens)}")] if tokens else []
    found += [("tokens trained on, per block", f"{max(filter(None, tokens), default=0):,.0f}")] if tokens else []
    found += [("tokens per second, median", f"{rates[len(rates) // 2]:,.0f}")] if rates else []
    found += [("steps skipped", f"{skipped:,.0f}")] if skipped else []
    return found + ([("blocks tried again", f"{retries:,.0f}")] if retries else [])
