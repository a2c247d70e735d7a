"""Disks that are full or take nothing, and nobody who reads: four lines, and the same command finishes later."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.faults.cases import BLOCK_AP, CONVERSATIONS, E2E_QP, GENERATE_DATA, LLM_QAT, RTN, SINGLE, Case
from tests.faults.conftest import Bench, Tally
from tests.faults.warm import Fault

STREAMS = BLOCK_AP["disk", "files"]
ROOMY = "256m"


def mount(folder: Path, options: str) -> bool:
    """Mount a file system in memory, or change it; returns whether that is allowed here."""
    words = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    return subprocess.run(words, capture_output=True, check=False).returncode == 0


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[bool]:
    """Let a folder be a disk of so many bytes; yields whether that is allowed here."""
    allowed = mount(folder, f"size={size}")
    try:
        yield allowed
    finally:
        if allowed:
            subprocess.run(["umount", str(folder)], check=True)


def filled(bench: Bench, case: Case, size: int) -> tuple[str, bool, list[str]]:
    """Run a command on a disk that is too small, then where there is room.

    Returns:
        What was tried, whether it failed, and what went wrong.
    """
    folder = bench.new()
    with small_disk(folder, size) as allowed:
        fault = Fault(sees_space=True) if allowed else Fault(largest_file=size // 8)
        what = "full disk (tmpfs)" if allowed else "largest file (RLIMIT_FSIZE; this machine mounts no tmpfs)"
        ended = bench.run(case, folder, fault)
        wrong = [] if ended.status == 0 or ended.four_lines else [f"status {ended.status}: {ended.err[-1500:]}"]
        if allowed:
            assert mount(folder, f"remount,size={ROOMY}")
        wrong += bench.differences(case, folder)
    return what, ended.status != 0, [f"{case.name}, {size} bytes: {each}" for each in wrong]


def size_of(bench: Bench, case: Case) -> int:
    """Bytes of what a command makes."""
    return sum(len(content) for content in bench.whole(case)[0].values() if isinstance(content, bytes))


def test_a_disk_that_fills_up(bench: Bench, tally: Tally) -> None:
    what, failed, wrong = filled(bench, STREAMS, size_of(bench, STREAMS) * 2 // 3)
    assert failed
    tally(what, 1, wrong[:1])


@pytest.mark.faults
@pytest.mark.parametrize("case", SINGLE, ids=lambda case: case.name)
def test_disks_of_several_sizes(bench: Bench, tally: Tally, case: Case) -> None:
    trains, pages = case in (E2E_QP, CONVERSATIONS, LLM_QAT), 10 * 4096
    whole = size_of(bench, case) * (4 if trains else 1) + pages
    tried, failures = 0, []
    for part in (0.02, 0.1, 0.2, 0.3, 0.45, 0.6, 0.75, 0.85, 0.95):
        what, failed, wrong = filled(bench, case, int(part * whole))
        tried += failed
        failures += wrong[:1]
    tally(what, tried, failures)


@pytest.mark.faults
@pytest.mark.parametrize("case", [case for case in SINGLE if case is not GENERATE_DATA], ids=lambda case: case.name)
def test_files_may_not_grow(bench: Bench, tally: Tally, case: Case) -> None:
    largest = max(len(content) for content in bench.whole(case)[0].values() if isinstance(content, bytes))
    tried, failures = 0, []
    for part in (0.1, 0.5, 0.9):
        folder = bench.new()
        ended = bench.run(case, folder, Fault(largest_file=int(part * largest)))
        tried += ended.status != 0
        wrong = [] if ended.status == 0 or ended.four_lines else [f"status {ended.status}: {ended.err[-1500:]}"]
        wrong += bench.differences(case, folder)
        failures += [f"{case.name}, {part}: {each}" for each in wrong[:1]]
    tally("largest file (RLIMIT_FSIZE)", tried, failures)


# ---- outputs that cannot be -------------------------------------------------------------------------


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Let nothing be written below a folder: a mount where that is allowed, permissions where they count."""
    if mount(folder, f"size={ROOMY}"):
        assert mount(folder, "remount,ro")
        try:
            yield
        finally:
            subprocess.run(["umount", str(folder)], check=True)
        return
    assert os.geteuid() != 0, "a superuser who may not mount cannot make a folder read-only"
    folder.chmod(0o555)
    try:
        yield
    finally:
        folder.chmod(0o755)


def refusals(bench: Bench, case: Case, folder: Path) -> list[str]:
    ended = bench.run(case, folder)
    return [] if ended.four_lines else [f"{case.name}: status {ended.status}, {ended.err[-1500:]}"]


@pytest.mark.parametrize(
    "case",
    [RTN, *(pytest.param(case, marks=pytest.mark.faults) for case in (STREAMS, E2E_QP, LLM_QAT, GENERATE_DATA))],
    ids=lambda case: case.name,
)
def test_a_read_only_output(bench: Bench, tally: Tally, case: Case) -> None:
    folder = bench.new()
    with read_only(folder):
        tally("read-only output", 1, refusals(bench, case, folder))


def a_file(folder: Path) -> None:
    folder.rmdir()
    folder.write_text("mine")


def a_dangling_link(folder: Path) -> None:
    folder.rmdir()
    folder.symlink_to("nowhere/at/all")


def output_a_file(folder: Path) -> None:
    (folder / "run").write_text("mine")


def output_a_dangling_link(folder: Path) -> None:
    (folder / "run").symlink_to("nowhere/at/all")


def output_a_loop(folder: Path) -> None:
    (folder / "run").symlink_to("run")


@pytest.mark.parametrize(
    "spoil", [a_file, a_dangling_link, output_a_file, output_a_dangling_link, output_a_loop], ids=lambda f: f.__name__
)
@pytest.mark.parametrize(
    "case",
    [RTN, *(pytest.param(case, marks=pytest.mark.faults) for case in (BLOCK_AP["ram", "files"], E2E_QP, LLM_QAT))],
    ids=lambda case: case.name,
)
def test_an_output_that_cannot_be(bench: Bench, tally: Tally, case: Case, spoil: object) -> None:
    folder = bench.new()
    assert callable(spoil)
    spoil(folder)
    ended = bench.run(case, folder)
    made = ended.status == 0 and (folder / "run" / "model" / "eqat.json").is_file()  # a link to a folder yet to be
    wrong = [] if ended.four_lines or made else [f"{case.name}: status {ended.status}, {ended.err[-1500:]}"]
    tally("output a file, below a file, a dangling or circular link", 1, wrong)


# ---- nobody reads -----------------------------------------------------------------------------------


@pytest.mark.parametrize("stdout", ["full", "unread"])
@pytest.mark.parametrize(
    "case",
    [
        STREAMS,
        *(pytest.param(case, marks=pytest.mark.faults) for case in (RTN, E2E_QP, LLM_QAT, GENERATE_DATA)),
    ],
    ids=lambda case: case.name,
)
def test_nobody_reads(bench: Bench, tally: Tally, case: Case, stdout: str) -> None:
    folder = bench.new()
    ended = bench.run(case, folder, Fault(stdout=stdout))
    wrong = [] if ended.status == 0 else [f"{case.name}: status {ended.status}, {ended.err[-1500:]}"]
    tally("stdout closed or on a full disk", 1, wrong or bench.unlike(case, folder))


def test_a_terminal_without_the_characters(bench: Bench, tally: Tally) -> None:
    words = ["generate", "--model", str(bench.place.tiny.folder), "--prompt", "日w5", "--device", "cpu"]
    ended = bench.warm.run(words, Fault(encoding="cp1252"))
    tally("stdout in cp1252", 1, [] if ended.status == 0 and ended.out else [ended.err])
