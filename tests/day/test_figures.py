"""The figures of docs/llava.md are those of `eqat plan`."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from contextlib import redirect_stdout
from datetime import datetime, timedelta
from typing import Any

import pytest

from eqat_mm.cli import main
from eqat_mm.plan.amounts import size
from eqat_mm.runtime.progress import duration
from tests.day.document import DOCUMENT

PLAN = ["--gpu", "a100", "--gpus", "8", "--ram", "512", "--disk", "2000", "--json"]


def phases(model: str, *flags: str) -> dict[str, dict[str, Any]]:
    said = io.StringIO()
    with redirect_stdout(said):
        assert main(["plan", model, *PLAN, *flags]) == 0
    return {phase["name"]: phase for phase in json.loads(said.getvalue())["phases"]}


def steps(model: str) -> Iterator[tuple[str, dict[str, Any], bool]]:
    """What the table has for a model: step, phase, and whether its time is told."""
    found = phases(model)
    yield "Block-AP, one card", found["Block-AP"], True
    yield "the same, `--spool disk`", phases(model, "--spool", "disk")["Block-AP"], True
    yield "E2E-QP, eight cards", found["E2E-QP, images and text"], True
    yield "evaluation, one card", found["evaluation"], False
    yield "a checkpoint", found["checkpoint"], False


def rows(model: str, name: str) -> Iterator[str]:
    for step, phase, timed in steps(model):
        totals = [phase[amount]["total"] for amount in ("gpu", "ram", "disk", "written")]
        time = duration(phase["seconds"]["total"]) if timed else ""
        yield f"| {' | '.join([step, name, *(size(total) if total else '' for total in totals), time])} |"


@pytest.mark.parametrize("name", ["7B", "13B"])
def test_the_table_is_that_of_the_plan(name: str) -> None:
    expected = list(rows(f"llava-1.5-{name.lower()}", name))
    found = [line for line in DOCUMENT.read_text(encoding="utf-8").splitlines() if f" | {name} | " in line]
    assert found == expected


def test_the_hours_leave_time_for_what_is_planned() -> None:
    hours = dict(re.findall(r"^## (\d\d:\d\d) (.*)$", DOCUMENT.read_text(encoding="utf-8"), re.M))
    times = [datetime.strptime(time, "%H:%M") for time in hours]
    assert times == sorted(times)
    planned = phases("llava-1.5-7b")
    for heading, phase in (("Block-AP", "Block-AP"), ("E2E-QP", "E2E-QP, images and text")):
        at = list(hours.values()).index(heading)
        end = times[at] + timedelta(seconds=planned[phase]["seconds"]["total"])
        assert end <= times[at + 1] <= end + timedelta(minutes=30)
