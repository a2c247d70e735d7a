"""Whether a run, finished or not, goes as it should: losses, steps that were undone, the plan."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import fmean
from typing import Any

from eqat_mm.report.found import Record, Stage, number
from eqat_mm.report.planned import beside
from eqat_mm.verify.checks import Check, judged, not_looked_at

PLAN_TOLERANCE = 1.15
"""Memory may be this many times the plan's: the error that a plan admits of its own figures."""


def training_checks(stage: Stage) -> Iterator[Check]:
    """Yield what the numbers of a run say of it.

    Args:
        stage: of a run that is not finished, what there is. Rounding has no numbers of its own.
    """
    if stage.command == "rtn":
        return
    if not stage.metrics:
        yield not_looked_at("losses", "metrics.jsonl is not there, or empty")
    elif stage.command == "block-ap":
        yield from _blocks(stage.metrics)
    else:
        yield from _steps(stage.metrics)
    yield from _planned(stage)


def _blocks(records: list[Record]) -> Iterator[Check]:
    """Yield what the blocks of Block-AP say: a loss on held-out samples before training and after each."""
    losses = {f"block {record.get('block')}": _losses(record) for record in records}
    odd = [f"{name} {_arrow(both)}" for name, both in losses.items() if None in both]
    yield judged("losses", odd, f"{len(losses)} blocks, all finite")
    worse = [f"{name} {_arrow(both)}" for name, both in losses.items() if None not in both and both[1] > both[0]]
    yield judged("training", worse, "no block is worse behind it than at its start")
    errors = {str(record.get("block")): number(record.get("relative_error")) for record in records}
    lost = [f"block {name} {error:.3f}" for name, error in errors.items() if error is not None and error >= 1]
    largest = max((error for error in errors.values() if error is not None), default=0.0)
    yield judged("relative error", lost, f"at most {largest:.3f}; from 1 on a block says nothing of its outputs")
    undone = [
        f"block {record.get('block')}: {record.get('skipped')} steps skipped, {record.get('retries')} retries"
        for record in records
        if number(record.get("skipped")) or number(record.get("retries"))
    ]
    yield judged("steps", undone, "none was undone")


def _losses(record: Record) -> tuple[Any, Any]:
    """Return the losses before and after training; None for one that is not finite."""
    return number(record.get("loss_before")), number(record.get("loss_after"))


def _arrow(losses: tuple[Any, Any]) -> str:
    return " -> ".join("not finite" if loss is None else f"{loss:.3g}" for loss in losses)


def _steps(records: list[Record]) -> Iterator[Check]:
    """Yield what the steps of an end-to-end trainer say."""
    logged = [record for record in records if "loss" in record]
    losses = [loss for record in logged if (loss := number(record["loss"])) is not None]
    yield judged("losses", ["some are not finite"] * (len(losses) < len(logged)), f"{len(logged)} logged, all finite")
    yield _trend(losses)
    norms = [number(record.get("grad_norm")) for record in logged if "grad_norm" in record]
    wrong = {f"{norms.count(0.0)} of {len(norms)} are zero": 0.0 in norms, "some are not finite": None in norms}
    yield judged("gradients", [said for said, true in wrong.items() if true], f"{len(norms)} logged, none zero")


def _trend(losses: list[float]) -> Check:
    """Return whether the last quarter of the losses is below the first."""
    part = len(losses) // 4
    if not part:
        return not_looked_at("training", "fewer than four losses")
    first, last = fmean(losses[:part]), fmean(losses[-part:])
    return Check("training", last <= first, f"loss {first:.4g} -> {last:.4g}")


def _planned(stage: Stage) -> Iterator[Check]:
    """Yield memory beside the plan, which judges, and time, which other work on the machine may double."""
    for row in beside(stage):
        if row.ratio is None or (row.what == "time" and not stage.finished):
            continue
        said = f"{row.measured}, planned {row.planned} ({row.ratio:.2f})"
        yield Check(row.what, None if row.what == "time" else row.ratio <= PLAN_TOLERANCE, said)
