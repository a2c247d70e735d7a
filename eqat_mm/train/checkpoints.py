"""Training checkpoints of the end-to-end trainers on disk: whole, or not there.

    checkpoint-N/
        trained.safetensors     what is trained and nothing else, float32, by the names of the modules
        optimizer-*.safetensors steps and the two moments of AdamW, whole, by the same names
        scheduler.pt            learning-rate schedule
        rng_state*.pth          state of the random generators of each process
        trainer_state.json      step, position in the data, log
        checkpoint.json         written last: what kind of run it is of, and the SHA-256 of every other file

It is written under another name, fsynced and renamed. What is not whole is skipped, never loaded in part.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from eqat_mm.errors import ConfigError, ResourceError
from eqat_mm.runtime.files import fsync, read_json, sha256_of, write_json
from eqat_mm.runtime.progress import say

RECORD = "checkpoint.json"
TRAINED = "trained.safetensors"
STATE = "trainer_state.json"
KEPT = 2
"""Checkpoints that stay: the newest, and the one before."""

_PARTIAL = ".partial"
_OF_TORCH_SAVE = ("inline_container", "Parent directory")
"""In what `torch.save` says of a file that it could not write."""


@dataclass(frozen=True)
class Facts:
    """What a checkpoint says about itself.

    Attributes:
        step: optimizer steps that were taken.
        total: optimizer steps of the whole run.
        run: what must be the same where it is continued, in words or numbers.
        trained: shape of each trained tensor.
    """

    step: int
    total: int
    run: dict[str, Any]
    trained: dict[str, list[int]]


class Damaged(Exception):
    """A checkpoint that is not what was written; the text says why."""


def path_of(folder: Path, step: int) -> Path:
    """Return where the checkpoint of a step is, in the Trainer's folder."""
    return folder / f"checkpoint-{step}"


def partial_of(path: Path) -> Path:
    """Return where a checkpoint is written until it is whole."""
    return path.with_name(path.name + _PARTIAL)


def optimizer_file(key: str) -> str:
    """Return the name of the file that holds one of `moments.KEYS`."""
    return f"optimizer-{key}.safetensors"


def complete(path: Path, facts: Facts, processes: int) -> None:
    """Make the files in `partial_of(path)` the checkpoint `path`, and drop all older ones but the one before.

    Args:
        path: of the checkpoint.
        facts: about it.
        processes: how many have written to it.

    Raises:
        ResourceError: processes did not write to the same folder.
    """
    partial = partial_of(path)
    _require_shared(partial, processes)
    files = [file for file in sorted(partial.rglob("*")) if file.is_file()]
    for file in (*files, *(folder for folder in partial.rglob("*") if folder.is_dir())):
        fsync(file)
    record: dict[str, Any] = asdict(facts)
    record["files"] = {file.relative_to(partial).as_posix(): sha256_of(file) for file in files}
    write_json(partial / RECORD, record | {"sha256": _digest(record)})
    shutil.rmtree(path, ignore_errors=True)  # a damaged one that was skipped
    os.replace(partial, path)
    fsync(path.parent)
    _rotate(path)


def newest(folder: Path, run: Mapping[str, Any], trained: Mapping[str, list[int]]) -> tuple[Path, Facts] | None:
    """Return the newest whole checkpoint, which must be of this run; say which are skipped, and why.

    Args:
        folder: the Trainer's.
        run: as in `Facts`.
        trained: as in `Facts`.

    Raises:
        ConfigError: it is of another kind of run.
    """
    for partial in folder.glob(f"checkpoint-*{_PARTIAL}"):
        shutil.rmtree(partial, ignore_errors=True)
    paths = checkpoints_in(folder)
    for path in paths:
        try:
            facts = checked(path)
        except Damaged as damage:
            say(f"{path} is skipped: {damage}")
            continue
        _require_same(path, facts, run, trained)
        say(f"continuing from {path}")
        return path, facts
    if paths:
        say(f"no checkpoint in {folder} is whole: training starts from the beginning")
    return None


def checkpoints_in(folder: Path) -> list[Path]:
    """Return the checkpoints of a run, whole or not, newest first."""
    paths = [path for path in folder.glob("checkpoint-*") if _step_of(path) is not None]
    return sorted(paths, key=lambda path: _step_of(path) or 0, reverse=True)


def checked(path: Path) -> Facts:
    """Return what a checkpoint says about itself, every byte of it checked.

    Raises:
        Damaged: it is not whole, or not as it was written.
    """
    try:
        record = read_json(path / RECORD)
    except FileNotFoundError:
        raise Damaged(f"no {RECORD} in it, so it was not finished") from None
    except (OSError, ValueError) as error:
        raise Damaged(f"{RECORD} is unreadable ({error})") from error
    if not isinstance(record, dict) or record.pop("sha256", None) != _digest(record):
        raise Damaged(f"{RECORD} was altered")
    for name, expected in record.pop("files").items():
        _check_file(path / name, expected)
    facts = Facts(**record)
    if facts.step != _step_of(path):
        raise Damaged(f"it is of step {facts.step}")
    return facts


def read_trained(path: Path) -> dict[str, Tensor]:
    """Return the trained tensors of a whole checkpoint by the names of the modules, on the CPU."""
    return load_file(path / TRAINED)


@contextmanager
def written(path: Path) -> Iterator[None]:
    """Let libraries that write a checkpoint fail as the disk does: with an error that says what to do.

    Raises:
        ResourceError: a file could not be written.
    """
    try:
        yield
    except (SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not any(word in str(error) for word in _OF_TORCH_SAVE):
            raise
        raise ResourceError(
            where=str(path),
            given=f"it could not be written: {str(error).splitlines()[0]}",
            allowed="a disk with room for two checkpoints and the next",
            do="make room; the same command continues from the checkpoint before",
        ) from error


def _check_file(path: Path, expected: str) -> None:
    try:
        found = sha256_of(path)
    except FileNotFoundError:
        raise Damaged(f"{path.name} is missing") from None
    except OSError as error:
        raise Damaged(f"{path.name} is unreadable ({error})") from error
    if found != expected:
        raise Damaged(f"{path.name} was altered: sha256 {found[:12]}..., recorded {expected[:12]}...")


def _require_same(path: Path, facts: Facts, run: Mapping[str, Any], trained: Mapping[str, list[int]]) -> None:
    different = [name for name in facts.run.keys() | run.keys() if facts.run.get(name) != run.get(name)]
    if different:
        names = sorted(different)
        raise ConfigError(
            where=f"{path}: {', '.join(names)}",
            given=", ".join(f"{name} {run.get(name)}" for name in names),
            allowed=", ".join(f"{name} {facts.run.get(name)}" for name in names) + ", as when it was saved",
            do="start the same command in the same way (--global_batch keeps the samples per step with any number of"
            " processes), or --overwrite true to begin again, or another --output",
        )
    names = sorted(
        name for name in facts.trained.keys() | trained.keys() if facts.trained.get(name) != trained.get(name)
    )
    if names:
        raise ConfigError(
            where=f"{path}: {names[0]}" + (f" and {len(names) - 1} more" if len(names) > 1 else ""),
            given=f"shape {trained.get(names[0], 'none: it is not trained')}",
            allowed=f"shape {facts.trained.get(names[0], 'none: it was not trained')}, as when it was saved",
            do="train the same parts of the same model, or --overwrite true to begin again, or another --output",
        )


def _require_shared(partial: Path, processes: int) -> None:
    found = len(list(partial.glob("rng_state*.pth")))
    if found != processes:
        raise ResourceError(
            where=str(partial),
            given=f"files of {found} of {processes} processes",
            allowed="one folder that all processes, on all machines, write to",
            do="choose an --output on a file system that all machines share",
        )


def _rotate(path: Path) -> None:
    """Remove all checkpoints but `path` and those right before it; newer ones were damaged, or they would be this."""
    step = _step_of(path)
    paths = checkpoints_in(path.parent)
    kept = [other for other in paths if (_step_of(other) or 0) <= (step or 0)][:KEPT]
    for other in paths:
        if other not in kept:
            shutil.rmtree(other, ignore_errors=True)


def _step_of(path: Path) -> int | None:
    _, _, number = path.name.rpartition("-")
    return int(number) if number.isdecimal() else None


def _digest(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
