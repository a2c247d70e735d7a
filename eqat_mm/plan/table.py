"""A plan as text: one line a phase, then every number with its formula."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from eqat_mm.plan.amounts import Amount, Phase, size
from eqat_mm.plan.machine import Machine
from eqat_mm.plan.verdict import Verdict
from eqat_mm.runtime.progress import duration

_HEADINGS = f"{'phase':<24}{'GPU':>10}{'RAM':>11}{'disk':>11}{'written':>11}{'time':>9}  fits"


def summary(verdicts: Iterable[Verdict]) -> str:
    """Return one line for each phase below headings."""
    return "\n".join([_HEADINGS, *map(_row, verdicts)])


def details(verdicts: Iterable[Verdict]) -> str:
    """Return every number of every phase with its formula, and what to change where something is short."""
    return "\n".join(line for verdict in verdicts for line in _details(verdict))


def advice(verdicts: Iterable[Verdict]) -> Iterable[str]:
    """Yield what to change about the phases that do not fit, line by line."""
    for verdict in verdicts:
        yield from (f"{verdict.phase.name}:{line}" for line in _short(verdict))


def one_line(phase: Phase, machine: Machine) -> str:
    """Return what a phase needs, in one line."""
    parts = [f"GPU {size(phase.gpu.total)}"] if machine.is_gpu else []
    parts += [f"RAM {size(phase.ram.total)}", f"disk {size(phase.disk.total)}, {size(phase.written.total)} written"]
    return f"plan of {phase.name}: {', '.join(parts)}; about {duration(phase.seconds.total)} on {machine.name}"


def _row(verdict: Verdict) -> str:
    phase = verdict.phase
    bytes_ = f"{_size(phase.gpu):>10}{_size(phase.ram):>11}{_size(phase.disk):>11}{_size(phase.written):>11}"
    return f"{phase.name:<24}{bytes_}{duration(phase.seconds.total):>9}  {_fits(verdict)}"


def _fits(verdict: Verdict) -> str:
    return "yes" if verdict.fits else f"short of {', '.join(shortage.what for shortage in verdict.shortages)}"


def _size(amount: Amount) -> str:
    return size(amount.total) if amount.total else ""


def _details(verdict: Verdict) -> Iterable[str]:
    phase = verdict.phase
    yield f"\n{phase.name}"
    for what, amount in (("GPU", phase.gpu), ("RAM", phase.ram), ("disk", phase.disk), ("written", phase.written)):
        yield from _terms(what, amount, size)
    yield from _terms("time", phase.seconds, duration)
    yield from _short(verdict)


def _short(verdict: Verdict) -> Iterable[str]:
    yield from (f"  short of {shortage}" for shortage in verdict.shortages)
    if not verdict.fits:
        yield f"  {verdict.advice()}"


def _terms(what: str, amount: Amount, shown: Callable[[float], str]) -> Iterable[str]:
    for position, term in enumerate(amount.terms):
        left = f"{what} {shown(amount.total)}" if position == 0 else ""
        yield f"  {left:<20}{shown(term.value):>10}  {term.what}: {term.formula}"
