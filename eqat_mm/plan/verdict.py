"""Does it fit, and if not, what to change."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from eqat_mm.plan.amounts import Phase, size
from eqat_mm.plan.machine import CONTEXT, Machine, card, card_names

MARGIN = 1.15
"""The figures are good to 15%: what is short by less may still run."""

Option = tuple[str, Callable[[], Phase]]
"""Flags of the command, and the plan of the phase with them."""


@dataclass(frozen=True)
class Shortage:
    """Something a phase needs more of than there is.

    Attributes:
        what: GPU memory, RAM or disk.
        needed: bytes.
        there: bytes.
    """

    what: str
    needed: float
    there: float

    @property
    def hopeless(self) -> bool:
        """Whether more is missing than the figures may be wrong by."""
        return self.needed > MARGIN * self.there

    def __str__(self) -> str:
        return f"{self.what}: {size(self.needed)} needed, {size(self.there)} there"


@dataclass(frozen=True)
class Verdict:
    """A phase on a machine.

    Attributes:
        phase: what is needed.
        shortages: of what there is too little; empty where it fits.
        cures: flags with which it would fit.
        cards: shipped cards whose memory would do, with the settings as they are.
    """

    phase: Phase
    shortages: tuple[Shortage, ...]
    cures: tuple[str, ...]
    cards: tuple[str, ...]

    @property
    def fits(self) -> bool:
        """Whether there is enough of everything that is known."""
        return not self.shortages

    def advice(self) -> str:
        """Return what to do where it does not fit, as one sentence."""
        ways = [f"with {flags}" for flags in self.cures]
        if any(shortage.what == "GPU memory" for shortage in self.shortages) and self.cards:
            ways.append(f"on {' or '.join(self.cards)}")
        return f"it fits {', or '.join(ways)}" if ways else "no single flag is enough: take another machine"


def judge(phase: Phase, machine: Machine, options: Iterator[Option] | tuple[Option, ...] = ()) -> Verdict:
    """Return whether a phase fits on a machine, and which of the options would make it fit."""
    short = shortages(phase, machine)
    cures = tuple(flags for flags, plan in options if not shortages(plan(), machine)) if short else ()
    return Verdict(phase, short, cures, fitting_cards(phase))


def shortages(phase: Phase, machine: Machine) -> tuple[Shortage, ...]:
    """Return what there is too little of; what is not known of a machine is not judged."""
    needs = (
        ("GPU memory", phase.gpu.total, machine.usable),
        ("RAM", phase.ram.total * phase.processes, machine.ram),
        ("disk", phase.disk.total, machine.disk),
    )
    return tuple(Shortage(what, need, there) for what, need, there in needs if there is not None and need > there)


def fitting_cards(phase: Phase) -> tuple[str, ...]:
    """Return the shipped cards on which a phase that was planned for a GPU fits."""
    needed = phase.gpu.total
    return tuple(name for name in card_names() if needed and needed <= (card(name).memory or 0) - CONTEXT)


def with_ram_and_disk(machine: Machine, ram: float | None, disk: float | None) -> Machine:
    """Return the machine with RAM and disk, in GB, that a user names."""
    known = {name: value * 1e9 for name, value in (("ram", ram), ("disk", disk)) if value is not None}
    return replace(machine, **known)  # type: ignore[arg-type]
