"""What is on the disk about a run, or about several runs of one model in one folder: records, metrics, evaluations."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from eqat_mm.checkpoint.manifest import MANIFEST, Manifest, read_manifest
from eqat_mm.errors import CheckpointError, EqatError
from eqat_mm.runtime.files import read_json_object
from eqat_mm.runtime.place import RECORD
from eqat_mm.runtime.sealed import read_sealed

Record = dict[str, Any]
Fingerprint = Callable[[Path], str]
"""From a model folder to a hash of what is in it."""

TITLES = {"rtn": "round-to-nearest", "block-ap": "Block-AP", "e2e-qp": "E2E-QP", "llm-qat": "LLM-QAT"}
_DEPTH = 2


@dataclass(frozen=True)
class Stage:
    """One run that made, or is making, a checkpoint.

    Attributes:
        name: of its folder, within the one that the report is about.
        folder: of the run.
        record: content of `run.json`.
        metrics: content of `metrics.jsonl`, line by line.
        manifest: of the checkpoint; None where there is none yet.
        fingerprint: of the checkpoint; None where there is none yet.
    """

    name: str
    folder: Path
    record: Record
    metrics: list[Record]
    manifest: Manifest | None
    fingerprint: str | None

    @property
    def model(self) -> Path:
        """Folder of the checkpoint."""
        return self.folder / "model"

    @property
    def command(self) -> str:
        """Which command made it."""
        return str(self.record.get("command", ""))

    @property
    def title(self) -> str:
        """All that was done to the weights, first to last: `Block-AP + E2E-QP`."""
        if self.manifest is None:
            return TITLES.get(self.command, self.command)
        done = [str(one.get("command", "")) for one in self.manifest.provenance]
        done = [*done[:-1], self.manifest.stage if self.manifest.stage in ("lora", "projector") else done[-1]]
        return " + ".join(TITLES.get(each, each) for each in done if each != "save_pretrained")

    @property
    def finished(self) -> bool:
        """Whether the run has come to its end."""
        return "finished" in self.record and self.manifest is not None

    @property
    def seconds(self) -> float | None:
        """Wall time of all starts together; of a run that is not finished, of what it has committed."""
        blocks = [number(record.get("seconds")) or 0.0 for record in self.metrics]
        recorded = number(self.record.get("seconds"))
        return recorded if self.finished else max(recorded or 0.0, sum(blocks))

    def setting(self, name: str) -> Any:
        """Return one of the settings it was started with; None without."""
        return table(self.record.get("config")).get(name)


@dataclass(frozen=True)
class Measured:
    """One evaluation of one model.

    Attributes:
        file: where it is written.
        model: as it was named.
        fingerprint: of the model; None where it was not recorded.
        numbers: `perplexity`, `kl`, `top1_agreement`, or `tasks`.
        text: hash of the tokens it was measured on; None where it was not recorded.
    """

    file: Path
    model: str
    fingerprint: str | None
    numbers: Record
    text: str | None


@dataclass(frozen=True)
class Found:
    """What a report is about.

    Attributes:
        root: the folder.
        stages: runs in it, in the order in which they were started.
        measured: evaluations in it.
        unread: files that could not be read, and why.
    """

    root: Path
    stages: list[Stage] = field(default_factory=list)
    measured: list[Measured] = field(default_factory=list)
    unread: list[tuple[str, str]] = field(default_factory=list)

    def of(self, stage: Stage) -> list[Measured]:
        """Return the evaluations of a stage's checkpoint."""
        return [one for one in self.measured if one.fingerprint and one.fingerprint == stage.fingerprint]


def find(root: Path, fingerprint: Fingerprint) -> Found:
    """Look through the folder of a run, or that of several runs of one model.

    Raises:
        CheckpointError: no run is there.
    """
    root = root if root.name not in ("", "..") else root.resolve()
    found = Found(root)
    records = [root / RECORD] if (root / RECORD).is_file() else list(_below(root, RECORD))
    for path in records:
        _take(found, path, partial(_add_run, found, path, fingerprint))
    if not found.stages:
        raise CheckpointError(
            where=str(root),
            given="no such folder" if not root.is_dir() else f"no {RECORD} of a run that makes a checkpoint",
            allowed="the folder of a run, or the one above several runs of one model, as runs/MODEL-SPEC",
            do="name one that `eqat block-ap`, `e2e-qp`, `rtn` or `llm-qat` has written",
        )
    around = root.parent if (root / RECORD).is_file() else root
    for path in sorted({*_below(around, "*.json"), *around.glob("eval/*.json")}):
        if path.name not in (RECORD, "state.json", "results.json"):
            _take(found, path, partial(_add_evaluation, found, path))
    found.stages.sort(key=lambda stage: str(stage.record.get("started", "")))
    return found


def _below(root: Path, pattern: str) -> Iterator[Path]:
    for depth in range(_DEPTH + 1):
        for path in sorted(root.glob("*/" * depth + pattern)):
            inner = path.relative_to(root).parts[:-1]
            if not any(part.startswith(".") or part in ("model", "trainer") for part in inner):
                yield path


def _take(found: Found, path: Path, add: Callable[[], None]) -> None:
    """Add what is in a file; note it where it cannot be read."""
    try:
        add()
    except (EqatError, OSError, ValueError) as error:
        reason = error.given if isinstance(error, EqatError) else f"{type(error).__name__}: {error}"
        found.unread.append((str(path.relative_to(found.root.parent)), reason))


def _add_run(found: Found, path: Path, fingerprint: Fingerprint) -> None:
    record, folder = read_sealed(path), path.parent
    if record.get("command") == "export":  # the same weights as those of the run that it is made from
        return
    if (folder / "result.json").is_file() or "eval" in path.relative_to(found.root).parts:
        _add_note(found, folder, record)
        return
    packed = (folder / "model" / MANIFEST).is_file()
    manifest = read_manifest(folder / "model") if packed else None
    name = folder.name if folder == found.root else str(folder.relative_to(found.root))
    metrics = _lines(found, folder / "metrics.jsonl")
    found.stages.append(
        Stage(name, folder, record, metrics, manifest, fingerprint(folder / "model") if packed else None)
    )


def _add_note(found: Found, folder: Path, record: Record) -> None:
    """Add what a table has noted of one of its rows."""
    decides, path = table(record.get("decides")), folder / "result.json"
    if path.is_file():
        numbers = read_json_object(path)
        found.measured.append(Measured(path, folder.name, decides.get("model"), numbers, decides.get("tokens")))


def _add_evaluation(found: Found, path: Path) -> None:
    """Add what `eqat eval --output` has written; files of another kind are none of ours."""
    if path.name == "result.json" and (path.parent / RECORD).is_file():
        return
    numbers = read_json_object(path)
    if isinstance(numbers.get("model"), str) and ("perplexity" in numbers or "tasks" in numbers):
        named = numbers.get("fingerprint"), numbers.get("text")
        found.measured.append(Measured(path, numbers["model"], named[0], numbers, named[1]))


def _lines(found: Found, path: Path) -> list[Record]:
    """Return the records of a JSON lines file up to the first line that is none: a killed process may leave half."""
    records: list[Record] = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                record = None
            if not isinstance(record, dict):
                found.unread.append((str(path.relative_to(found.root.parent)), f"line {len(records) + 1} is no record"))
                break
            records.append(record)
    return records


def number(value: Any) -> float | None:
    """Return a finite number as it is, None for anything else: files may hold anything."""
    plain = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if plain and math.isfinite(value) else None


def table(value: Any) -> Record:
    """Return a JSON object as it is, an empty one for anything else."""
    return value if isinstance(value, dict) else {}
