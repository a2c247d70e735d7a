"""Run folders: where they are, what decides a run, and when one is continued, finished or refused."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from eqat_mm.checkpoint.verify import MANIFEST, read_manifest
from eqat_mm.errors import ConfigError
from eqat_mm.quant.spec import QuantSpec
from eqat_mm.runtime.files import read_json, write_json
from eqat_mm.runtime.precision import resolve
from eqat_mm.runtime.progress import say
from eqat_mm.runtime.provenance import provenance, require_same_config

_RECORD = "run.json"

Job = TypeVar("Job")


def default_output(model: str, spec: QuantSpec) -> Path:
    """Return `runs/MODEL-SPEC`, the folder of all runs on one model and spec."""
    return Path("runs") / f"{Path(model).name}-{spec.name}"


def settings(job: Any, data_digest: str | None = None) -> dict[str, Any]:
    """Return what decides a job's result, JSON-ready.

    Args:
        job: dataclass; where it writes and what it discards are left out.
        data_digest: hash of what it trains on, so that changed data is noticed.
    """
    fields = asdict(job)
    for name in ("output", "overwrite"):
        fields.pop(name, None)
    plain: dict[str, Any] = json.loads(json.dumps(fields, default=str))
    if data_digest is not None:
        plain["data_digest"] = data_digest
    return plain


def with_precision(job: Job, folder: Path, device: torch.device) -> Job:
    """Return the job with `precision: auto` decided; a run that is continued keeps what it was started with."""
    if getattr(job, "precision", None) != "auto":
        return job
    record = folder / _RECORD
    started = read_json(record)["config"]["precision"] if record.is_file() else resolve("auto", device)
    return replace(job, precision=started)  # type: ignore[type-var]


def begin_run(
    folder: Path, command: str, config: dict[str, Any], seed: int, *, write: bool = True
) -> dict[str, Any] | None:
    """Record a run in its folder; return the record, or None where the same run is finished already.

    Of several processes only the first writes.

    Raises:
        ConfigError: the folder holds a run with other settings, finished or not.
    """
    if (folder / "model" / MANIFEST).is_file():
        done = read_manifest(folder / "model").provenance[-1]["config"]
        require_same_config(done, config, f"--output {folder}, a finished run")
        say(f"already finished: {folder / 'model'}")
        return None
    if (folder / "state.json").is_file() or (folder / "trainer").is_dir():
        require_same_config(read_json(folder / _RECORD)["config"], config, f"--output {folder}, an unfinished run")
    record = provenance(command, config, seed)
    if write:
        write_json(folder / _RECORD, record)
    return record


def seconds_of(folder: Path, seconds: float) -> float:
    """Return the wall time of the run that made a checkpoint; 0 for a folder that no run made.

    It is kept beside the checkpoint, so that who starts a finished run again still learns it.

    Args:
        folder: `OUTPUT/model`, or the folder of a full-precision model.
        seconds: wall time just now; counts where none was kept before.
    """
    path = folder.parent / "seconds.json"
    if folder.name != "model":
        return 0.0
    if path.is_file():
        return float(read_json(path))
    write_json(path, seconds)
    return seconds


def discard(folder: Path) -> None:
    """Remove a run folder, where there is one."""
    shutil.rmtree(folder, ignore_errors=True)


def require_single_process(command: str) -> None:
    """Check that no launcher started several copies of this command.

    Raises:
        ConfigError: WORLD_SIZE is above 1.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            where=f"{command}: WORLD_SIZE",
            given=os.environ["WORLD_SIZE"],
            allowed="1: its steps follow one another in one process",
            do="start it without a launcher, or with one process",
        )
