"""Commands that something befalls, in processes forked from one that has imported everything: a try takes a second."""

from __future__ import annotations

import multiprocessing
import os
import re
import resource
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
_IMPORTED = [
    "tests.faults.warm",
    "torch",
    "transformers",
    "transformers.trainer",
    "transformers.models.llama.modeling_llama",
    "transformers.models.llava.modeling_llava",
    "transformers.models.clip.modeling_clip",
    "eqat_mm.commands.tables.llm_qat_table",
    "eqat_mm.commands.verbs.generate_data",
    "eqat_mm.commands.tables.ladder",
]
_CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link", "os.symlink"}
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_PATIENCE = 240.0  # seconds


@dataclass(frozen=True)
class Fault:
    """What befalls a command.

    Attributes:
        before_operation: of the file operations below the watched folder, the one before which it is killed, from 1.
        after: seconds after which it is sent a signal.
        signal: that it is sent then.
        largest_file: bytes; what would make a file larger fails.
        dies_of_large_files: it does not fail, the process dies within that write.
        environment: variables that are set.
        stdout: `kept`, `full` for a disk that takes nothing, `unread` for a pipe that nobody reads.
        encoding: of what it says.
        sees_space: it takes the disk for empty, as if others filled it later.
    """

    before_operation: int | None = None
    after: float | None = None
    signal: int = signal.SIGKILL
    largest_file: int | None = None
    dies_of_large_files: bool = False
    environment: Mapping[str, str] = field(default_factory=dict)
    stdout: str = "kept"
    encoding: str = "utf-8"
    sees_space: bool = False


@dataclass(frozen=True)
class Ended:
    """A command that has ended.

    Attributes:
        status: its exit status; -N where signal N killed it.
        out: what it said.
        err: what it complained of.
        operations: file operations that change something below the watched folder.
        seconds: that it took.
    """

    status: int
    out: str
    err: str
    operations: int
    seconds: float

    @property
    def four_lines(self) -> bool:
        """Whether it ended as bad input does: status 2, and where, given, allowed, do."""
        found = re.search(r"^  where: .+\n  given: [^|]+^  allowed: .+\n  do: ", self.err, re.MULTILINE)
        return self.status == 2 and found is not None and "Traceback" not in self.err


class Warm:
    """Starts commands.

    Args:
        scratch: folder of what they say.
        watched: folder whose file operations are counted.
    """

    def __init__(self, scratch: Path, watched: Path) -> None:
        self.scratch, self.watched, self._count = scratch, watched, 0
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(_IMPORTED)

    def run(self, words: Sequence[str], fault: Fault | None = None, cwd: Path | None = None) -> Ended:
        """Run a command to its end, whatever that is."""
        with self.started(words, fault, cwd) as (process, told):
            began = time.monotonic()
            if fault is not None and fault.after is not None:
                process.join(fault.after)
                send(process, fault.signal)
            process.join(_PATIENCE)
            assert process.exitcode is not None, f"{words[0]} hangs"
            return told(time.monotonic() - began)

    @contextmanager
    def started(
        self, words: Sequence[str], fault: Fault | None = None, cwd: Path | None = None
    ) -> Iterator[tuple[BaseProcess, Any]]:
        """Yield a process in which the command has begun, and what returns how it ended."""
        self._count += 1
        said = self.scratch / f"said-{self._count}"
        said.mkdir()
        fault = fault or Fault()
        given = (list(map(str, words)), str(said), fault, str(self.watched), str(cwd or self.scratch))
        process = self._context.Process(target=_work, args=given)
        process.start()
        while process.is_alive() and not (said / "begun").exists():
            time.sleep(0.001)

        def told(seconds: float) -> Ended:
            assert process.exitcode is not None
            out, err, operations = (
                (said / name).read_text("utf-8", "replace") for name in ("out", "err", "operations")
            )
            return Ended(process.exitcode, out, err, len(operations), seconds)

        try:
            yield process, told
        finally:
            if process.is_alive():
                process.kill()
            process.join()


def send(process: BaseProcess, number: int) -> None:
    """Send a signal to a process that may have ended."""
    if process.is_alive() and process.pid is not None:
        os.kill(process.pid, number)


def _work(words: list[str], said: str, fault: Fault, watched: str, cwd: str) -> None:
    """Run a command in this process, whose fault it is."""
    os.environ.update(fault.environment)
    os.chdir(cwd)
    _redirect(Path(said), fault)
    if fault.largest_file is not None:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (fault.largest_file, resource.RLIM_INFINITY))
        if fault.dies_of_large_files:
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    _watch(Path(said) / "operations", watched, fault.before_operation)
    import torch

    from eqat_kernels import dispatch
    from eqat_mm.cli import main
    from eqat_mm.runtime import room

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))  # read once, before the fork

    if fault.sees_space:
        room.shutil.disk_usage = lambda _: type("Usage", (), {"free": 2**50})  # type: ignore[attr-defined, misc]

    sys.argv = ["eqat", *words]
    with dispatch.use(os.environ.get("EQAT_KERNELS", "auto")):  # this, too
        (Path(said) / "begun").touch()
        sys.exit(main())


def _redirect(said: Path, fault: Fault) -> None:
    read, write = os.pipe()
    os.close(read)
    targets = {"kept": said / "out", "full": Path("/dev/full")}
    (said / "out").touch()
    out = write if fault.stdout == "unread" else os.open(targets[fault.stdout], os.O_WRONLY)
    os.dup2(out, 1)
    os.dup2(os.open(said / "err", os.O_WRONLY | os.O_CREAT), 2)
    sys.stdout = open(1, "w", encoding=fault.encoding, closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", encoding=fault.encoding, closefd=False)  # noqa: SIM115


def _watch(notes: Path, watched: str, fatal: int | None) -> None:
    """Note every file operation below a folder, and die before one of them."""
    notes_file = os.open(notes, os.O_WRONLY | os.O_CREAT)
    count = 0

    def audit(event: str, args: tuple[Any, ...]) -> None:
        nonlocal count
        writes = event == "open" and isinstance(args[2], int) and args[2] & _WRITES and _is_below(args[0], watched)
        if not writes and event not in _CHANGES:
            return
        count += 1
        if count == fatal:
            os.kill(os.getpid(), signal.SIGKILL)
        os.write(notes_file, b".")

    sys.addaudithook(audit)


def _is_below(path: Any, folder: str) -> bool:
    return isinstance(path, str | bytes | os.PathLike) and os.path.abspath(os.fsdecode(path)).startswith(folder)
