"""What is checked of a folder, and what became of it: one line each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes:
        name: what, in a word or two.
        passed: whether it is as it should be; None where it could not be looked at.
        said: what was seen.
    """

    name: str
    passed: bool | None
    said: str

    @property
    def line(self) -> str:
        """What is printed of it."""
        mark = "-" if self.passed is None else "ok" if self.passed else "FAIL"
        return f"{mark:<5}{self.name}: {self.said}"


def judged(name: str, wrong: Sequence[str], right: str) -> Check:
    """Return a check that passed if nothing is wrong, with the first of what is."""
    more = f" and {len(wrong) - 3} more" if wrong[3:] else ""
    return Check(name, not wrong, f"{'; '.join(wrong[:3])}{more}" if wrong else right)


def not_looked_at(name: str, reason: str) -> Check:
    """Return a check that was not made."""
    return Check(name, None, f"not looked at: {reason}")


def tried(name: str, look: Callable[[], Check | Iterable[Check]]) -> list[Check]:
    """Return what a check finds; whatever it ends with over a damaged folder is a failure of it, never a traceback."""
    try:
        found = look()
        return [found] if isinstance(found, Check) else list(found)
    except Exception as error:  # noqa: BLE001 - readers and libraries raise what they like over a damaged file
        said = getattr(error, "given", None) or f"{type(error).__name__}: {error}"
        where = f"{error.where}: " if hasattr(error, "where") else ""
        return [Check(name, False, " ".join(f"{where}{said}".split())[:300])]
