"""A run: a folder that one job fills.

It knows what decides its result, whether that is there, who works on it, and what in the folder is its own:

    run.json    the record: command, settings, what decides, environment, versions, seconds, whether it is finished
    run.lock    while a process works on it
    .replaced   the run that this one takes the place of, until this one is finished

Beside these lie progress and product of the job. The product's last file, its proof, is written when all else is there.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from eqat_mm.errors import CheckpointError, ConfigError
from eqat_mm.runtime.files import sha256_of
from eqat_mm.runtime.lock import locked
from eqat_mm.runtime.memory import peak_bytes
from eqat_mm.runtime.place import Place
from eqat_mm.runtime.progress import say
from eqat_mm.runtime.provenance import differences, provenance, require_same_config, versions
from eqat_mm.runtime.room import require_disk
from eqat_mm.runtime.sealed import read_sealed, write_sealed

_OF_THE_RUN = ("finished", "seconds", "proof", "plan", "peak_ram")
"""What the record says of the run alone, not of what it makes."""


@dataclass(frozen=True)
class Asked:
    """What a job asks for.

    Attributes:
        command: its name.
        config: all its settings, for the record.
        decides: what decides the result, JSON-ready; a run continues only where this is the same.
        environment: what may differ in a run that continues; it is said then.
        seed: of the job.
        inputs: files and folders that it reads, which no run may lie above.
    """

    command: str
    config: dict[str, Any]
    decides: dict[str, Any]
    environment: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    inputs: tuple[Path, ...] = ()


class Run:
    """One run, opened by `Run.open`.

    Attributes:
        place: where it keeps what.
        finished: its product is there, and is what this job would make.
    """

    def __init__(self, place: Place, asked: Asked) -> None:
        self.place, self.asked = place, asked
        self.finished = False
        self._alone = True
        self._record: dict[str, Any] | None = None
        self._replaces = False
        self._started = time.monotonic()

    @classmethod
    @contextmanager
    def open(
        cls,
        place: Place,
        asked: Asked,
        *,
        check: Callable[[], object] = lambda: None,
        overwrite: bool = False,
        on_change: str = "refuse",
        first: bool = True,
        shared: bool = False,
    ) -> Iterator[Run]:
        """Take hold of the run in a place, new or not. Nothing is written but the lock.

        Args:
            place: where it keeps what.
            asked: what the job asks for.
            check: raises an `EqatError` where a finished product is damaged.
            overwrite: a run that is there already is to be replaced.
            on_change: what a run is that something else decided: `refuse` it, or `replace` it.
            first: this is the process that writes; the others of a job only read, once the first has begun.
            shared: several processes work on the run, each on its own progress.

        Raises:
            ConfigError: another process works on it; something else decided the run that is there; what is there was
                not written by a run, or holds an input.
            CheckpointError: its record or its product is damaged.
        """
        run = cls(place, asked)
        run._alone = first and not shared
        with locked(place.folder, shared=shared) if first else nullcontext():
            run._find(overwrite=overwrite and first, on_change=on_change)
            if run.finished and first:
                run._look_after(check)
            try:
                yield run
            finally:
                if run._alone and run._record is not None:
                    run._note_seconds()
        if place.hidden:
            run._leave()

    @property
    def folder(self) -> Path:
        """Folder of its progress."""
        return self.place.folder

    @property
    def record(self) -> dict[str, Any]:
        """What is said of the run in the manifest of what it makes."""
        assert self._record is not None, "the run has not begun"
        return {name: value for name, value in self._record.items() if name not in _OF_THE_RUN}

    @property
    def seconds(self) -> float:
        """Seconds that processes have worked on it."""
        return float((self._record or {}).get("seconds", 0.0))

    def begin(self, **facts: Any) -> None:
        """Write that the run has begun, or goes on, with facts for its reader; what it replaces is set aside."""
        if self._replaces:
            self.place.set_aside()
            self._replaces = False
        elif self._record is None and self.place.record.is_file():  # another process that shares the run began it
            self._record = read_sealed(self.place.record)
        self._sweep()
        if self._record is None:
            self._record = provenance(self.asked.command, self.asked.config, self.asked.seed)
            self._record |= {"decides": self.asked.decides, "environment": self.asked.environment, "seconds": 0.0}
        else:
            for fact in ("finished", "proof"):  # there, if somebody has removed the product
                self._record.pop(fact, None)
            self._go_on(self._record)
        self.note(**facts)

    def finish(self) -> None:
        """Write that the run is finished; its progress goes, and so does what it replaces."""
        assert self._record is not None, "the run has not begun"
        self._note_seconds()
        peak = max(peak_bytes(torch.device("cpu")), self._record.get("peak_ram", 0))
        self.note(finished=_now(), proof=sha256_of(self.place.proof), peak_ram=peak)
        self._tidy()
        self.finished = True

    @property
    def written(self) -> int:
        """Bytes that it has written and will not have to write again."""
        return 0 if self._replaces else self.place.written()

    def note(self, **facts: Any) -> None:
        """Add facts about the product to the record."""
        assert self._record is not None, "the run has not begun"
        self._record |= facts
        write_sealed(self.place.record, self._record)

    def finished_meanwhile(self) -> bool:
        """Whether another process that shares the run has finished it."""
        there = self.place.record.is_file() and self.place.proof.is_file() and not self._replaces
        return there and "finished" in read_sealed(self.place.record)

    def require_room(self, needed: int, what: str) -> None:
        """Check that the disk has room for what the run will write.

        Raises:
            ResourceError: it has not.
        """
        require_disk(self.folder, needed, what, self.written)

    def _find(self, *, overwrite: bool, on_change: str) -> None:
        self.place.require_apart(self.asked.inputs)
        if not self.place.record.exists():
            self.place.require_no_strangers()
            return
        found = read_sealed(self.place.record, "decides", "environment", "versions")
        changed = found.get("decides") != self.asked.decides
        if overwrite or (changed and on_change == "replace"):
            self._replaces = True
            return
        self.finished = self.place.proof.is_file()
        what = "a finished run" if self.finished else "an unfinished run"
        require_same_config(found.get("decides", {}), self.asked.decides, f"--output {self.place.name}, {what}")
        self._record = found

    def _look_after(self, check: Callable[[], object]) -> None:
        """Check the product of a finished run; do what a process that was killed behind its last file left undone."""
        assert self._record is not None
        given = sha256_of(self.place.proof)
        proof = self._record.get("proof", given)
        if given != proof:
            raise CheckpointError(
                where=str(self.place.proof),
                given=f"sha256 {given[:16]}...",
                allowed=f"sha256 {proof[:16]}..., as the run has recorded it",
                do="the file was altered: make it again with --overwrite, or give another --output",
            )
        check()
        if "finished" not in self._record:
            self.finish()
        self._tidy()

    def _go_on(self, record: dict[str, Any]) -> None:
        before, now = record["environment"] | record["versions"], self.asked.environment | versions()
        changed = [f"{key} {given} (was {was})" for key, (was, given), _ in differences(before, now)]
        if changed:
            say(f"this run goes on with {', '.join(changed)}: numbers may differ in the last bits")
            record.setdefault("continued", []).append({"started": _now(), "environment": now})

    def _leave(self) -> None:
        """Remove the hidden folder of a finished run, or one that stayed empty."""
        if self.finished or self.finished_meanwhile():
            with suppress(ConfigError), locked(self.folder):  # nobody else is at work
                self.place.sweep()
            shutil.rmtree(self.folder, ignore_errors=True)
        with suppress(OSError):
            self.folder.rmdir()

    def _note_seconds(self) -> None:
        assert self._record is not None
        now = time.monotonic()
        self._record["seconds"] = round(self.seconds + now - self._started, 3)
        self._started = now
        if not self.finished and self.place.record.is_file():
            write_sealed(self.place.record, self._record)

    def _tidy(self) -> None:
        self.place.drop_progress()
        self._sweep()

    def _sweep(self) -> None:
        if self._alone:
            self.place.sweep()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
