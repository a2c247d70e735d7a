"""`eqat block-ap` and `eqat rtn`: a full-precision model in, a packed checkpoint out."""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from eqat_mm.blocks.source import OpenModel, open_model
from eqat_mm.checkpoint.verify import MANIFEST
from eqat_mm.commands.models import best_device, load_tokenizer, model_folder, require_model
from eqat_mm.commands.recipes import warn_without_recipe
from eqat_mm.data.windows import TextWindows, text_windows
from eqat_mm.errors import ConfigError
from eqat_mm.quant.spec import QuantSpec
from eqat_mm.runtime.files import write_json
from eqat_mm.runtime.progress import say
from eqat_mm.runtime.provenance import provenance
from eqat_mm.train.block_ap import BlockAPConfig, check_groups, run_block_ap
from eqat_mm.train.rtn import run_rtn
from llava_adapters import arch_of_folder


@dataclass(frozen=True)
class BlockAPJob(BlockAPConfig):
    """Block-AP of a model.

    Attributes:
        model: model folder, alias (`eqat assets`) or hub repository.
        output: run folder; the checkpoint is `OUTPUT/model`. Default: runs/MODEL-SPEC/block-ap.
        calibration: text that the blocks are fitted on.
        adapter: architecture, where config.json does not decide it.
        device: cpu, cuda, cuda:N, or auto.
        overwrite: discard a run that is already in the output folder.
        recipe_for: models that these settings were tuned for (set by recipes).
    """

    model: str = "smollm2-135m"
    output: Path | None = None
    calibration: TextWindows = field(default_factory=lambda: TextWindows(count=4096))
    adapter: str | None = None
    device: str = "auto"
    overwrite: bool = False
    recipe_for: tuple[str, ...] = ()


@dataclass(frozen=True)
class RTNJob:
    """Round-to-nearest of a model on min-max grids: no calibration, no training.

    Attributes:
        model: model folder, alias or hub repository.
        output: run folder; the checkpoint is `OUTPUT/model`. Default: runs/MODEL-SPEC/rtn.
        quant: bits, group size, symmetry.
        adapter: architecture, where config.json does not decide it.
        overwrite: discard a checkpoint that is already in the output folder.
    """

    model: str = "smollm2-135m"
    output: Path | None = None
    quant: QuantSpec = field(default_factory=QuantSpec)
    adapter: str | None = None
    overwrite: bool = False


def block_ap(job: BlockAPJob) -> Path:
    """Run or continue Block-AP; return the folder of the checkpoint.

    Raises:
        EqatError: any bad input, before anything is written.
    """
    warn_without_recipe(job.model, job.recipe_for, "block-ap")
    opened = _open(job.model, job.adapter)
    check_groups(opened, job.quant)
    windows = text_windows(load_tokenizer(opened.folder), job.calibration)
    batches = [{"input_ids": window.unsqueeze(0)} for window in windows]
    folder = job.output or default_output(job.model, job.quant) / "block-ap"
    if finished(folder, overwrite=job.overwrite, config=settings(job)):
        return folder / "model"
    record = provenance("block-ap", settings(job), job.seed)
    write_json(folder / "run.json", record)
    device = best_device(job.device)
    run_block_ap(opened, batches, job, folder, device=device, source=job.model, provenance=record)
    say(f"checkpoint: {folder / 'model'}")
    return folder / "model"


def rtn(job: RTNJob) -> Path:
    """Round a model to nearest; return the folder of the checkpoint.

    Raises:
        EqatError: any bad input, before anything is written.
    """
    opened = _open(job.model, job.adapter)
    check_groups(opened, job.quant)
    folder = job.output or default_output(job.model, job.quant) / "rtn"
    if finished(folder, overwrite=job.overwrite, config=settings(job)):
        return folder / "model"
    record = provenance("rtn", settings(job), 0)
    write_json(folder / "run.json", record)
    run_rtn(opened, job.quant, folder, source=job.model, provenance=record)
    say(f"checkpoint: {folder / 'model'}")
    return folder / "model"


def default_output(model: str, spec: QuantSpec) -> Path:
    """Return `runs/MODEL-SPEC`, the folder of all runs on one model and spec."""
    return Path("runs") / f"{Path(model).name}-{spec.name}"


def settings(job: Any) -> dict[str, Any]:
    """Return what decides a job's result, JSON-ready: its fields without where it writes and what it discards."""
    fields = asdict(job)
    for name in ("output", "overwrite"):
        fields.pop(name, None)
    return {name: str(value) if isinstance(value, Path) else _plain(value) for name, value in fields.items()}


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _open(model: str, adapter: str | None) -> OpenModel:
    folder = model_folder(model)
    require_model(folder)
    return open_model(folder, arch_of_folder(folder, adapter))


def finished(folder: Path, *, overwrite: bool, config: dict[str, Any]) -> bool:
    """Whether the run in `folder` is complete; with `overwrite` it is removed first.

    Raises:
        ConfigError: a complete run with other settings is in the folder.
    """
    from eqat_mm.checkpoint.verify import read_manifest

    if overwrite:
        shutil.rmtree(folder, ignore_errors=True)
    if not (folder / "model" / MANIFEST).is_file():
        return False
    done = read_manifest(folder / "model").provenance[-1]["config"]
    different = sorted(key for key in done.keys() | config.keys() if done.get(key) != config.get(key))
    if different:
        raise ConfigError(
            where=f"--output {folder}",
            given=f"a finished run with other {', '.join(different)}",
            allowed="an empty folder, or the same settings",
            do="choose another --output, or --overwrite to discard that run",
        )
    say(f"already finished: {folder / 'model'}")
    return True
