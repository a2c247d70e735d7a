"""Results of a plan: sums of named terms, each with its formula."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Term:
    """One part of an amount.

    Attributes:
        what: its name.
        value: bytes or seconds.
        formula: how the value came about, for people.
    """

    what: str
    value: float
    formula: str


@dataclass(frozen=True)
class Amount:
    """A sum of terms, in bytes or in seconds."""

    terms: tuple[Term, ...] = ()

    @property
    def total(self) -> float:
        """The sum."""
        return sum(term.value for term in self.terms)

    def __add__(self, other: Amount) -> Amount:
        return Amount(self.terms + other.terms)


def amount(*terms: tuple[str, float, str]) -> Amount:
    """Return a sum of (what, value, formula); terms of zero are left out."""
    return Amount(tuple(Term(*term) for term in terms if term[1]))


def largest(*moments: Amount) -> Amount:
    """Return the amount of the moment that needs most."""
    return max(moments, key=lambda moment: moment.total)


@dataclass(frozen=True)
class Phase:
    """What one phase of a run needs.

    Attributes:
        name: of the phase.
        gpu: bytes on each GPU at the peak, without the CUDA context; nothing on a CPU.
        ram: bytes of one process at the peak.
        disk: bytes in the run folder at the fullest.
        written: bytes written from beginning to end.
        seconds: wall time.
        processes: how many of them run beside one another.
    """

    name: str
    gpu: Amount
    ram: Amount
    disk: Amount
    written: Amount
    seconds: Amount
    processes: int = 1

    @property
    def totals(self) -> dict[str, float]:
        """Bytes and seconds without their terms, JSON-ready, for the record of a run."""
        return {name: getattr(self, name).total for name in ("gpu", "ram", "disk", "written", "seconds")}


def billions(number: float) -> str:
    """Return a count as `6.74 B` or `202.4 M`."""
    return f"{number / 1e9:.2f} B" if number >= 1e9 else f"{number / 1e6:.1f} M"


def size(number: float) -> str:
    """Return bytes in decimal units, as cards and disks are sold."""
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if number >= factor:
            return f"{number / factor:.2f} {unit}"
    return f"{number / 1e3:.0f} kB"
