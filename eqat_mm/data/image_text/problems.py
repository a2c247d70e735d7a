"""What is wrong with samples: its kinds, the report on a source, and the list of those found when their turn came."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path
from typing import ClassVar, Literal, NamedTuple

from eqat_mm.data.user_files import printable, told
from eqat_mm.errors import DataError, EqatError
from eqat_mm.runtime.files import append_jsonl, write_jsonl
from eqat_mm.runtime.progress import say, speaks

OnBadSample = Literal["error", "skip"]
TooLongSample = Literal["truncate", "skip", "error"]
_SHOWN = 10
_LATE = {"found": "in training"}
SKIP = "--conversations.on_bad_sample skip"
SKIP_LONG = "--conversations.too_long skip"


class BadSample(Exception):
    """One sample that cannot be used; its text says why. Never leaves this package as it is: see `report`.

    Attributes:
        kind: what is wrong with it, as a word for many.
        do: what mends samples of this kind.
    """

    kind: ClassVar[str] = "not in the format"
    do: ClassVar[str] = "mend or remove them"

    def __init__(self, problem: str) -> None:
        super().__init__(printable(problem))


class MissingImage(BadSample):
    """There is no file."""

    kind = "image missing"
    do = "name the folder of the images with --conversations.image_folder"


class UnreadableImage(BadSample):
    """There is something, but no image in it that can be used."""

    kind = "image unreadable"
    do = "fetch or convert these images again"


class TooLong(BadSample):
    """It has more tokens than may be."""

    kind = "too long"
    do = "raise --conversations.max_length, or let what does not fit be cut off: --conversations.too_long truncate"


class Refused(BadSample):
    """The model's processor cannot take it."""

    kind = "refused by the model's processor"
    do = "remove them, or mend the processor's files beside the weights"


KINDS = (BadSample, MissingImage, UnreadableImage, TooLong, Refused)
"""All kinds, as they are numbered in an index."""


class Inexact(Exception):
    """A shortcut gives something else than template and tokenizer."""


@contextmanager
def refusals() -> Iterator[None]:
    """Turn what a processor raises into `Refused`: it raises what it likes about a sample that does not suit it."""
    try:
        yield
    except (BadSample, EqatError, AssertionError, Inexact):
        raise
    except Exception as error:
        raise Refused(f"the model's processor refuses it ({told(error)})") from error


class Problem(NamedTuple):
    """A bad sample: file and record, and what is wrong, without the exception, which would keep its images alive."""

    where: str
    kind: type[BadSample]
    text: str

    @classmethod
    def of(cls, where: str, error: BadSample) -> Problem:
        """Return what is kept of an error."""
        return cls(printable(where), type(error), str(error))

    def __str__(self) -> str:
        return f"{self.where}: {self.text}"

    def as_dict(self) -> dict[str, str]:
        """Return it JSON-ready."""
        return {"kind": self.kind.kind, "where": self.where, "problem": self.text}


@dataclass(frozen=True)
class Tolerance:
    """What becomes of bad samples.

    Attributes:
        on_bad_sample: `error` or `skip`.
        max_skipped: largest share of all samples that is skipped. Up to ten are in any case: all are then shown.
        file: where all are listed, a line of JSON each; None lists the first of each kind only.
        too_long: the same for those that are too long; `truncate` says nothing of those that cannot be cut.
    """

    on_bad_sample: OnBadSample = "error"
    max_skipped: float = 0.1
    file: Path | None = None
    too_long: TooLongSample = "truncate"

    def allows(self, bad: int, total: int) -> bool:
        """Return whether so many bad samples of `total` are not too many."""
        return bad < total and bad <= max(_SHOWN, self.max_skipped * total)

    def skips(self, kind: type[BadSample]) -> bool:
        """Return whether bad samples of a kind are skipped."""
        own = self.too_long if issubclass(kind, TooLong) and self.too_long != "truncate" else self.on_bad_sample
        return own == "skip"


def report(source: str, problems: Sequence[Problem], total: int, tolerance: Tolerance) -> None:
    """Raise for bad samples, or say how many are skipped: of each kind how many, and the first ten.

    Args:
        source: file or data set they are from.
        problems: the bad samples.
        total: number of samples that were checked.
        tolerance: what becomes of them.

    Raises:
        DataError: bad samples are an error, too many to be skipped, or none is left.
    """
    listed = _list(problems, tolerance.file)
    if not problems:
        return
    kinds = Counter(problem.kind for problem in problems).most_common()
    lines = [line for kind, _ in kinds for line in _lines_of(kind, problems)] + listed
    refused = [kind for kind, _ in kinds if not tolerance.skips(kind)]
    if not refused and tolerance.allows(len(problems), total):
        say("\n".join([f"{printable(source)}: {len(problems):,} of {total:,} samples are skipped:", *lines]))
        return
    raise DataError(
        printable(source),
        "\n".join([f"{len(problems):,} bad samples of {total:,}:", *lines]),
        _allowed(refused, tolerance) if len(problems) < total else "at least one sample that can be used",
        f"{(refused or [kinds[0][0]])[0].do}; {_way_out(len(problems), total, refused, tolerance)}",
    )


class LateProblems:
    """Samples that turn out to be bad when their turn comes: each is counted and listed once.

    Args:
        source: file or data set they are from.
        total: number of samples.
        tolerance: what becomes of them.
    """

    def __init__(self, source: str, total: int, tolerance: Tolerance) -> None:
        self._source = source
        self._total = total
        self._tolerance = tolerance
        self._found: dict[str, Problem] = {}

    def add(self, problem: Problem) -> None:
        """Take note of a bad sample; the first of its kind is said.

        Raises:
            DataError: bad samples are an error, or are too many by now to be skipped.
        """
        if not self._tolerance.skips(problem.kind):
            raise _late(problem)
        if problem.where in self._found:
            return
        known = {found.kind for found in self._found.values()}
        self._found[problem.where] = problem
        if self._tolerance.file is not None:
            with suppress(OSError):
                append_jsonl(self._tolerance.file, problem.as_dict() | _LATE)
        if not self._tolerance.allows(len(self._found), self._total):
            report(self._source, list(self._found.values()), self._total, replace(self._tolerance, file=None))
        if problem.kind not in known:
            say(f"{problem}; another sample stands in for it, and for others like it")


def say_late(file: Path) -> None:
    """Say how many samples were found bad in training, by all processes together, if any."""
    if not file.is_file():
        return
    lines = {line for line in file.read_text(encoding="utf-8").splitlines() if json.dumps(_LATE)[1:-1] in line}
    kinds = Counter(json.loads(line)["kind"] for line in lines)
    if kinds:
        counts = ", ".join(f"{count:,} {kind}" for kind, count in kinds.most_common())
        say(f"other samples stood in for {len(lines):,} that could not be used: {counts}; see {file}")


def _list(problems: Sequence[Problem], file: Path | None) -> list[str]:
    """Write all problems to the file, by kind; return the line that says so. A list of before goes."""
    if file is None or not speaks():
        return []
    with suppress(OSError):  # a folder that cannot be written must not hide what is wrong with the data
        if problems:
            write_jsonl(file, sorted((problem.as_dict() for problem in problems), key=lambda line: line["kind"]))
            return [f"    all are listed in {file}"]
        file.unlink(missing_ok=True)
    return []


def _lines_of(kind: type[BadSample], problems: Sequence[Problem]) -> list[str]:
    of_kind = [problem for problem in problems if problem.kind is kind]
    lines = [f"    {len(of_kind):,} {kind.kind}:", *(f"        {problem}" for problem in of_kind[:_SHOWN])]
    return lines + ([f"        and {len(of_kind) - _SHOWN:,} more"] if len(of_kind) > _SHOWN else [])


def _allowed(refused: Sequence[type[BadSample]], tolerance: Tolerance) -> str:
    if refused:
        return "samples that can all be used"
    return f"bad samples up to a share of {tolerance.max_skipped:g}, or up to {_SHOWN}"


def _way_out(bad: int, total: int, refused: Sequence[type[BadSample]], tolerance: Tolerance) -> str:
    share = ceil(100 * bad / total) / 100
    if bad == total:
        return "none of them can be used as it is"
    flags = [SKIP] if tolerance.on_bad_sample == "error" and any(kind is not TooLong for kind in refused) else []
    flags += [SKIP_LONG] if TooLong in refused and tolerance.too_long == "error" else []
    flags += [SKIP] if TooLong in refused and tolerance.too_long == "truncate" and SKIP not in flags else []
    flags += [] if tolerance.allows(bad, total) else [f"--conversations.max_skipped {share:g}"]
    return f"or leave them out: {' '.join(flags)}"


def _late(problem: Problem) -> DataError:
    return DataError(
        problem.where,
        problem.text,
        "a sample that can be used, as it seemed to be when the samples were checked",
        f"start the same command again with {SKIP}: the run goes on, and another sample stands in; or mend the file",
    )
