"""SIGKILL anywhere: the same command then makes what it would have made, and nothing else is left."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator

import pytest

from tests.faults.cases import BLOCK_AP, E2E_QP, GENERATE_DATA, LADDERS, LLM_QAT, RTN, SINGLE, Case
from tests.faults.conftest import POINTS, Bench, Tally
from tests.faults.warm import ROOT, Fault

KILLED = -signal.SIGKILL
CHAINS = 4
"""Runs of a command that are killed again and again at random moments."""


def names(case: Case) -> str:
    return case.name


def spread(total: int, count: int, phase: float = 0.5) -> Iterator[int]:
    """Yield at most so many of the numbers from 1 to total, evenly spread."""
    count = min(count, total)
    yield from (1 + int((index + phase) * total / count) for index in range(count))


def killed_before(bench: Bench, case: Case, operations: Iterable[int]) -> tuple[int, list[str]]:
    """Kill a command before each of these file operations; return how many kills, and what was not mended."""
    failures, kills = [], 0
    for operation in operations:
        folder = bench.new()
        ended = bench.run(case, folder, Fault(before_operation=operation))
        kills += ended.status == KILLED
        if unlike := bench.differences(case, folder):
            failures.append(f"{case.name}, killed before operation {operation}: {unlike}")
    return kills, failures


def test_killed_twice_in_one_run(bench: Bench, tally: Tally) -> None:
    kills, failures = 0, []
    for case in (BLOCK_AP["disk", "files"], E2E_QP):
        folder, operations = bench.new(), bench.whole(case)[1].operations
        for operation in (operations // 2, operations // 4):
            kills += bench.run(case, folder, Fault(before_operation=operation)).status == KILLED
        if unlike := bench.differences(case, folder):
            failures.append(f"{case.name}: {unlike}")
    assert kills == 4
    tally("SIGKILL before a file operation, twice in one run", kills, failures)


@pytest.mark.faults
@pytest.mark.parametrize("case", [*SINGLE, *LADDERS], ids=names)
def test_killed_before_file_operations(bench: Bench, tally: Tally, case: Case) -> None:
    points = POINTS // 2 if case in LADDERS else POINTS
    operations = bench.whole(case)[1].operations
    tally(f"SIGKILL before a file operation: {case.name}", *killed_before(bench, case, spread(operations, points)))


@pytest.mark.faults
@pytest.mark.parametrize("case", [*SINGLE, *LADDERS], ids=names)
def test_killed_at_random_moments_again_and_again(bench: Bench, tally: Tally, case: Case) -> None:
    draw, seconds = random.Random(case.name), bench.whole(case)[1].seconds
    kills, failures = 0, []
    for _ in range(CHAINS):
        folder, moments = bench.new(), []
        for _ in range(draw.randint(1, 5)):
            moments.append(draw.uniform(0.1, 0.9) * seconds)
            ended = bench.run(case, folder, Fault(after=moments[-1]))
            kills += ended.status == KILLED
            seconds = min(seconds, ended.seconds) if ended.status == 0 and len(moments) == 1 else seconds
        if unlike := bench.differences(case, folder):
            failures.append(f"{case.name}, killed after {moments}: {unlike}")
    tally(f"SIGKILL at random moments, up to 5 in a run: {case.name}", kills, failures)


@pytest.mark.faults
@pytest.mark.parametrize("case", SINGLE, ids=names)
def test_dead_within_a_write(bench: Bench, tally: Tally, case: Case) -> None:
    largest = max(len(content) for content in bench.whole(case)[0].values() if isinstance(content, bytes))
    failures, deaths = [], 0
    for part in (0.05, 0.4, 0.95):
        folder = bench.new()
        ended = bench.run(case, folder, Fault(largest_file=int(part * largest), dies_of_large_files=True))
        deaths += ended.status == -signal.SIGXFSZ
        if unlike := bench.differences(case, folder):
            failures.append(f"{case.name}, dead at {part} of a file: {unlike}")
    tally("death within write(2) (RLIMIT_FSIZE with SIGXFSZ)", deaths, failures)


@pytest.mark.faults
@pytest.mark.parametrize("case", [RTN, BLOCK_AP["ram", "recompute"], E2E_QP, LLM_QAT, GENERATE_DATA], ids=names)
def test_the_real_command_killed_at_random_moments(bench: Bench, tally: Tally, case: Case) -> None:
    folder, draw = bench.new(), random.Random(case.name)
    command = [sys.executable, "-m", "eqat_mm.cli", *case.words(bench.place, case.output(folder))]
    seconds, kills = real(command, None)[1], 0
    folder = bench.new()
    command = [sys.executable, "-m", "eqat_mm.cli", *case.words(bench.place, case.output(folder))]
    for most in (1.0, 0.8, 0.6):  # the first start may have been slower than the next
        kills += real(command, draw.uniform(0.5, most) * seconds)[0] == KILLED
    assert real(command, None)[0] == 0
    tally("SIGKILL at random moments, the installed command", kills, bench.unlike(case, folder))


def real(command: list[str], after: float | None) -> tuple[int, float]:
    """Run a command in a process of its own, and kill it; return its exit status and how long it took."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0"}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, (ROOT, ROOT / "kernels", ROOT / "eval")))
    began = time.monotonic()
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, env=environment, **quiet) as process:
        try:
            return process.wait(after), time.monotonic() - began
        except subprocess.TimeoutExpired:
            process.kill()
            return process.wait(), time.monotonic() - began
