"""All checks, in the order in which they are run, and what became of each."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

from eqat_mm.blocks.arch import Arch
from eqat_mm.contract import conversation, files, forward, structure, training
from eqat_mm.contract.case import Case, NotHere
from eqat_mm.errors import EqatError

Check = Callable[[Case], None]

CHECKS: tuple[Check, ...] = (
    structure.parts,
    structure.kinds,
    structure.projector,
    structure.padding,
    structure.images,
    forward.stages,
    forward.sums,
    forward.experts,
    forward.smoothing,
    forward.chained,
    forward.chained_in_16_bits,
    forward.together,
    forward.one_block_in_memory,
    files.kept,
    files.symmetric,
    files.asymmetric,
    training.block_ap,
    training.e2e_qp,
    training.e2e_qp_on_images,
    conversation.inputs,
    conversation.questions,
)


@dataclass(frozen=True)
class Outcome:
    """What became of a check.

    Attributes:
        says: what should hold, a sentence.
        not_here: why there was nothing to check; None where there was.
        error: what does not hold; None where all does.
    """

    says: str
    not_here: str | None = None
    error: Exception | None = None


def outcomes(arch: Arch, folder: Path) -> Iterator[Outcome]:
    """Yield what becomes of every check of an adapter, one after the other.

    Args:
        arch: the adapter.
        folder: an empty one, for its tiny model and what is made of it.
    """
    try:
        with _quiet():
            case = Case(arch, folder)
    except Exception as error:  # noqa: BLE001 - a model's own code may raise anything where an adapter is wrong
        yield Outcome("A tiny model is made and saved", error=error)
        return
    for check in CHECKS:
        says = (check.__doc__ or "").partition("\n")[0].rstrip(".")
        try:
            with _quiet():
                check(case)
        except NotHere as reason:
            yield Outcome(says, not_here=str(reason))
        except Exception as error:  # noqa: BLE001 - a model's own code may raise anything where an adapter is wrong
            yield Outcome(says, error=error)
        else:
            yield Outcome(says)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep what trainers and libraries say of tiny models from the user."""
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def reason_of(error: Exception) -> str:
    """Return what is wrong in one line."""
    if isinstance(error, EqatError):
        return f"{error.where}: {error.given}; allowed: {error.allowed}; {error.do}"
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
