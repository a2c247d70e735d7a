"""What a command of a shell takes: seconds, CPU seconds of all its processes, and memory of the largest one.

    python benchmarks/measured_command.py FACTS COMMAND

runs it, and writes the latter two into FACTS, as JSON. A process counts the memory of the one that it was forked from
as its own, so `measured` does not fork what it measures: it starts this file, which is small.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

Started = subprocess.Popen[str]


@dataclass(frozen=True)
class Cost:
    """What a command took.

    Attributes:
        what: it is called.
        status: with which it ended.
        seconds: on the clock.
        log: file of what it said.
        cpu: seconds of all its processes.
        memory: of the largest process at its peak, in MiB.
    """

    what: str
    status: int
    seconds: float
    log: Path
    cpu: float
    memory: float

    def row(self) -> str:
        """Return a row of a table."""
        return f"| {self.what} | {self.seconds:.0f} | {self.cpu:.0f} | {self.memory:,.0f} |"


def measured(
    what: str,
    command: str,
    log: Path,
    place: Path,
    environment: dict[str, str],
    typed: str = "",
    stop: Callable[[Started], None] = lambda started: None,
) -> Cost:
    """Run a command; return what it took.

    Args:
        what: it is called.
        command: of a shell.
        log: file for what it says.
        place: folder that it runs in.
        environment: of its process.
        typed: on its keyboard.
        stop: ends it, or lets it run.
    """
    facts, begin = log.with_suffix(".json"), time.perf_counter()
    words = [sys.executable, __file__, str(facts), command]
    with log.open("w", encoding="utf-8") as said:
        started = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=said, stderr=said, text=True, cwd=place, env=environment
        )
        stop(started)
        started.communicate(typed)
    seconds = time.perf_counter() - begin
    return Cost(what, started.returncode, seconds, log, **json.loads(facts.read_text(encoding="utf-8")))


if __name__ == "__main__":
    status = subprocess.call(["bash", "-c", f"exec {sys.argv[2]}"])
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    found = {"cpu": used.ru_utime + used.ru_stime, "memory": used.ru_maxrss / 1024}
    Path(sys.argv[1]).write_text(json.dumps(found), encoding="utf-8")
    sys.exit(status if status >= 0 else 128 - status)
