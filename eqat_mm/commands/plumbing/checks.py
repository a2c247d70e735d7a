"""Checks of a folder as a command prints them: a line each, or one JSON object for scripts."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from eqat_mm.errors import CheckpointError
from eqat_mm.runtime.progress import say
from eqat_mm.verify.checks import Check


def print_checks(folder: Path, checks: Iterable[Check], allowed: str, do: str, *, as_json: bool) -> list[Check]:
    """Print what becomes of every check; return all.

    Args:
        folder: that they are made on.
        checks: made one by one.
        allowed: what a folder should be, for the error.
        do: what helps one that is not, for the error.
        as_json: print one object at the end instead of lines.

    Raises:
        CheckpointError: at least one has failed.
    """
    done = []
    for check in checks:
        done.append(check)
        if not as_json:
            say(check.line)
    failed = [check for check in done if check.passed is False]
    if as_json:
        say(json.dumps({"folder": str(folder), "passed": not failed, "checks": [asdict(check) for check in done]}))
    if failed:
        given = f"{len(failed)} of {len(done)} checks failed, the first: {failed[0].name}: {failed[0].said}"
        raise CheckpointError(str(folder), given, allowed, do)
    if not as_json:
        say(f"{folder}: {sum(check.passed is True for check in done)} checks passed")
    return done
