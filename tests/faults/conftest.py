"""What the faults befall, made once, and the table of what was tried and survived, printed at the end."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.faults.cases import Case, Place, make_place, outcome
from tests.faults.warm import ROOT, Ended, Fault, Warm

POINTS = int(os.environ.get("EQAT_FAULT_POINTS", "24"))
"""File operations of a command before which the long run kills it."""


@dataclass
class Bench:
    """Runs commands, each in a folder of its own.

    Attributes:
        folder: of everything.
        place: what the commands read.
        warm: starts them.
        wholes: what each undisturbed command made, and how it ended.
    """

    folder: Path
    place: Place
    warm: Warm
    wholes: dict[str, tuple[dict[str, Any], Ended]] = field(default_factory=dict)
    _count: int = 0

    def new(self) -> Path:
        """Make an empty folder."""
        self._count += 1
        folder = self.folder / "out" / f"{self._count}"
        folder.mkdir()
        return folder

    def run(self, case: Case, folder: Path, fault: Fault | None = None, *more: str) -> Ended:
        """Run a command whose output lies in a folder."""
        return self.warm.run([*case.words(self.place, case.output(folder)), *more], fault)

    def whole(self, case: Case) -> tuple[dict[str, Any], Ended]:
        """What the command makes undisturbed."""
        if case.name not in self.wholes:
            folder = self.new()
            ended = self.run(case, folder)
            assert ended.status == 0, ended.err
            self.wholes[case.name] = outcome(folder), ended
        return self.wholes[case.name]

    def differences(self, case: Case, folder: Path) -> list[str]:
        """Finish the run in a folder; return what is then otherwise than undisturbed."""
        ended = self.run(case, folder)
        return [ended.err] if ended.status else self.unlike(case, folder)

    def unlike(self, case: Case, folder: Path) -> list[str]:
        """What lies otherwise in a folder than undisturbed."""
        given, wanted = outcome(folder), self.whole(case)[0]
        return sorted(name for name in given.keys() | wanted.keys() if given.get(name) != wanted.get(name))


@pytest.fixture(scope="session")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    folder = tmp_path_factory.mktemp("faults")
    for name in ("in", "out", "said"):
        (folder / name).mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(map(str, (ROOT, ROOT / "kernels", ROOT / "eval"))))
        patch.setenv("EQAT_CACHE", str(folder / "cache"))
        patch.setenv("TRITON_INTERPRET", "0")
        warm = Warm(folder / "said", folder / "out")
        assert warm.run(["assets"]).status == 0
    return Bench(folder, make_place(folder / "in"), warm)


Tally = Callable[[str, int, list[str]], None]


@pytest.fixture
def tally(record_property: Callable[[str, Any], None]) -> Tally:
    """Note how often a fault was tried, and what did not survive it, of which there must be nothing."""

    def note(fault: str, tried: int, failures: list[str]) -> None:
        record_property("fault", [fault, tried, tried - len(failures)])
        assert tried > 0
        assert not failures, "\n".join(failures)

    return note


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print the table."""
    tried: Counter[str] = Counter()
    survived: Counter[str] = Counter()
    reports = [report for name in ("passed", "failed") for report in terminalreporter.stats.get(name, ())]
    for name, value in (each for report in reports for each in report.user_properties):
        if name == "fault":
            tried[value[0]] += value[1]
            survived[value[0]] += value[2]
    if tried:
        terminalreporter.section("faults")
        terminalreporter.write_line("| fault | tried | survived |\n|---|---|---|")
        for fault in sorted(tried):
            terminalreporter.write_line(f"| {fault} | {tried[fault]} | {survived[fault]} |")
