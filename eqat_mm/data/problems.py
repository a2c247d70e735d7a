"""What is wrong with samples, collected over a whole source before it is reported."""

from __future__ import annotations

from typing import Literal

from eqat_mm.errors import DataError
from eqat_mm.runtime.progress import say

OnBadSample = Literal["error", "skip"]
_SHOWN = 10


class BadSample(Exception):
    """One sample that cannot be used; its text says why. Never leaves this package: see `report`."""


def report(source: str, problems: list[str], total: int, on_bad_sample: OnBadSample) -> None:
    """Raise for bad samples, or say how many are skipped; both list the first ten.

    Args:
        source: file or data set they are from.
        problems: one line for each bad sample: where and what.
        total: number of samples that were checked.
        on_bad_sample: `error` or `skip`.

    Raises:
        DataError: with `error`, or where no good sample is left.
    """
    if not problems:
        return
    shown = [f"    {problem}" for problem in problems[:_SHOWN]]
    if len(problems) > _SHOWN:
        shown.append(f"    and {len(problems) - _SHOWN:,} more")
    if on_bad_sample == "skip" and len(problems) < total:
        say("\n".join([f"{source}: {len(problems):,} of {total:,} samples are skipped:", *shown]))
        return
    raise DataError(
        source,
        "\n".join([f"{len(problems):,} bad samples of {total:,}:", *shown]),
        "samples that can all be used" if on_bad_sample == "error" else "at least one sample that can be used",
        "mend or remove them, or leave them out with on_bad_sample: skip",
    )
