"""From a job to its run: where it is, what decides it, what it reads."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from eqat_kernels.dispatch import select
from eqat_mm.blocks.source import weight_files
from eqat_mm.checkpoint.folders import is_packed
from eqat_mm.checkpoint.manifest import read_manifest
from eqat_mm.checkpoint.verify import verify_checkpoint
from eqat_mm.errors import ConfigError
from eqat_mm.quant.spec import QuantSpec
from eqat_mm.runtime.device import require_kernels
from eqat_mm.runtime.files import fingerprint_of, write_json
from eqat_mm.runtime.place import Place
from eqat_mm.runtime.progress import say
from eqat_mm.runtime.provenance import require_same_config
from eqat_mm.runtime.room import require_writable
from eqat_mm.runtime.run import Asked, Run
from eqat_mm.runtime.sealed import read_sealed

Job = TypeVar("Job")

_PLACES = ("model", "quantized", "output", "source", "image_folder", "allocation")
"""Settings that name files and folders: what is in them decides, not how they are called."""
_HARMLESS = (
    "overwrite",
    "recipe_for",
    "device",
    "deepspeed",
    "logging_steps",
    "report_to",
    "save_steps",
    "batch_size",
    "accumulation",
    "global_batch",
    "gradient_checkpointing",
    "spool",
    "commit",
    "shard",
    "on_bad_sample",
    "max_skipped",
    "check",
    "dataloader_num_workers",
)
"""Settings that may change while a run goes on: they decide its course, not its result, but for the last bits."""
_COMPANIONS = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken")


def default_output(model: str, spec: QuantSpec) -> Path:
    """Return `runs/MODEL-SPEC`, the folder of all runs on one model and spec; with an allocation `runs/ITS-NAME`."""
    if isinstance(spec.allocation, Path):
        return Path("runs") / spec.allocation.stem
    return Path("runs") / f"{Path(model).name}-{spec.name}"


def allocated(spec: QuantSpec) -> dict[str, str]:
    """Return the input of a run that is the bits of each linear, as a hash; none where all have the same."""
    table = sorted(spec.table.items())
    return {"allocation": hashlib.sha256(repr(table).encode()).hexdigest()} if table else {}


def asked(command: str, job: Any, device: torch.device, inputs: dict[str, Path | str], **decides: Any) -> Asked:
    """Return what a job asks of a run.

    Args:
        command: its name.
        job: dataclass.
        device: it computes on.
        inputs: by name: folders of models, and hashes of data.
        decides: what decides the result beside settings and inputs.
    """
    config = settings(job)
    hashes = {name: model_fingerprint(given) if isinstance(given, Path) else given for name, given in inputs.items()}
    folders = tuple(given for given in inputs.values() if isinstance(given, Path))
    return Asked(
        command,
        config,
        what_decides(job) | {"inputs": hashes} | decides,
        environment(device),
        getattr(job, "seed", 0),
        (*folders, *(Path(path).expanduser() for path in _named(config, "source") if Path(path).expanduser().exists())),
    )


def settings(job: Any) -> dict[str, Any]:
    """Return all settings of a job, JSON-ready."""
    plain: dict[str, Any] = json.loads(json.dumps(asdict(job), default=str))
    return plain


def what_decides(job: Any) -> dict[str, Any]:
    """Return the settings of a job that decide its result: neither the names of places nor what is harmless."""
    names = (*_PLACES, *_HARMLESS)
    kept = {name: value for name, value in settings(job).items() if name not in names}
    for name in ("calibration", "data", "conversations", "quant"):
        if isinstance(kept.get(name), dict):
            kept[name] = {key: value for key, value in kept[name].items() if key not in names}
    return kept


def require_startable(job: Any, place: Place) -> None:
    """Check what is cheap to check of a run, before its data and models are read.

    Raises:
        ConfigError: its settings are not those of the run that is there.
        ResourceError: its folder cannot be written.
    """
    require_writable(place.folder)
    if place.record.is_file() and not getattr(job, "overwrite", False):
        before = read_sealed(place.record).get("decides", {})
        now = {name: value for name, value in what_decides(job).items() if value != "auto"}
        require_same_config({name: before.get(name) for name in now}, now, f"--output {place.folder}, a run")


def environment(device: torch.device) -> dict[str, Any]:
    """Return what a result may depend on in its last bits.

    Raises:
        ConfigError: the kernels that `EQAT_KERNELS` asks for cannot run here.
    """
    require_kernels(device)
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "kernels": select("fake_quantize", "auto", torch.empty(0, device=device)),
        "threads": torch.get_num_threads(),
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
    }


def model_fingerprint(folder: Path) -> str:
    """Return a hash of what is in a model folder: of a packed one that of its manifest, otherwise `fingerprint_of`."""
    if is_packed(folder):
        manifest = read_manifest(folder)
        return hashlib.sha256(repr((sorted(manifest.files.items()), manifest.spec)).encode()).hexdigest()
    companions = [path for pattern in _COMPANIONS for path in folder.glob(pattern) if path.is_file()]
    return fingerprint_of({*weight_files(folder), *companions})


def settled(job: Job, place: Place, choices: dict[str, Callable[[], str]]) -> Job:
    """Return the job with every `auto` decided that decides the result; a run that goes on keeps what it began with.

    Args:
        job: dataclass; with `overwrite` nothing is kept.
        place: of its run.
        choices: names of settings, and what `auto` means here and now.
    """
    open_ones = {name: choose for name, choose in choices.items() if getattr(job, name) == "auto"}
    kept = place.record.is_file() and not getattr(job, "overwrite", False)
    before = read_sealed(place.record).get("config", {}) if open_ones and kept else {}
    chosen = {name: before.get(name) or choose() for name, choose in open_ones.items()}
    return replace(job, **chosen)  # type: ignore[type-var]


@contextmanager
def opened_run(
    place: Place,
    asked: Asked,
    prepare: Callable[[Run], Mapping[str, Any]],
    *,
    overwrite: bool,
    from_first: Callable[[Callable[[], None]], Any] = lambda begin: begin(),
) -> Iterator[Run]:
    """Begin a run that makes a checkpoint, or go on with it, unless it is finished, which is said.

    Args:
        place: of the run.
        asked: what the job asks of it.
        prepare: raises an `EqatError` where the machine has no room for it; called before anything is written. It
            returns facts for the record.
        overwrite: replace a run that is there.
        from_first: calls a function in the first of several processes, before the others go on.

    Raises:
        EqatError: as `Run.open`, and what `prepare` raises.
    """
    with ExitStack() as stack:
        opened: list[Run] = []

        def begin() -> None:
            folder = place.proof.parent
            run = Run.open(place, asked, check=lambda: verify_checkpoint(folder), overwrite=overwrite)
            opened.append(stack.enter_context(run))
            if opened[0].finished:
                say(f"already finished: {folder}")
            else:
                opened[0].begin(**prepare(opened[0]))

        from_first(begin)
        yield opened[0] if opened else stack.enter_context(Run.open(place, asked, first=False))


def noted(
    folder: Path, command: str, decides: dict[str, Any], make: Callable[[], dict[str, Any]], *, anew: bool
) -> dict[str, Any]:
    """Return a result that an earlier start has noted, or make it and note it.

    Args:
        folder: of the note.
        command: that makes it.
        decides: what decides it, JSON-ready; a note of something else is replaced.
        make: returns it, JSON-ready.
        anew: make it again in any case.
    """
    place = Place.within(folder, "result.json")
    with Run.open(place, Asked(command, decides, decides), overwrite=anew, on_change="replace") as run:
        if not run.finished:
            run.begin()
            write_json(place.proof, make())
            run.finish()
    found: dict[str, Any] = json.loads(place.proof.read_text(encoding="utf-8"))
    return found


def slug(words: str) -> str:
    """Return words as the name of a folder."""
    return "-".join(re.findall(r"[a-z0-9]+", words.lower()))


def seconds_of(folder: Path) -> float:
    """Return the wall time of the run that made the checkpoint in `folder`; 0 for a folder that no run made."""
    record = folder.parent / "run.json"
    return float(read_sealed(record)["seconds"]) if folder.name == "model" and record.is_file() else 0.0


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


def _named(config: dict[str, Any], name: str) -> Iterator[str]:
    """Yield every setting of a name, at any depth."""
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _named(value, name)
        elif key == name and isinstance(value, str):
            yield value
        elif key == name and isinstance(value, list):
            yield from (each["path"] for each in value)
