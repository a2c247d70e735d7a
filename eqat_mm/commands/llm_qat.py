"""`eqat llm-qat`: a full-precision model in, one with quantized weights, activations and KV cache out."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import transformers
from torch import Tensor

from eqat_mm.blocks.source import OpenModel
from eqat_mm.checkpoint.folders import load_tokenizer, takes_images
from eqat_mm.commands.deepspeed_file import deepspeed_settings
from eqat_mm.commands.launchers import training_run, watched, whole_models
from eqat_mm.commands.models import load_model
from eqat_mm.commands.quantize import open_full_precision
from eqat_mm.commands.recipes import warn_without_recipe
from eqat_mm.data.text_settings import TextWindows
from eqat_mm.data.windows import digest_of, text_windows
from eqat_mm.runtime.device import best_device, processes
from eqat_mm.runtime.files import write_jsonl
from eqat_mm.runtime.place import Place
from eqat_mm.runtime.precision import frozen_dtype, resolve
from eqat_mm.runtime.progress import say
from eqat_mm.runtime.reporting import require_reporter
from eqat_mm.train.block_ap import check_groups
from eqat_mm.train.end_to_end import WindowDataset
from eqat_mm.train.llm_qat import ROUNDED, STAGE, LLMQATConfig, prepare, run_llm_qat, smooth_model, store
from eqat_mm.train.watch import Watch


@dataclass(frozen=True)
class LLMQATJob(LLMQATConfig):
    """LLM-QAT of a model.

    Attributes:
        model: model folder, alias (`eqat assets`) or hub repository.
        output: run folder; the checkpoint is `OUTPUT/model`. Default: runs/MODEL-BITS/llm-qat; rtn in place of llm-qat
            where nothing is trained.
        data: text to train on; for text that the model wrote itself, its file and `part: all`.
        adapter: architecture, where config.json does not decide it.
        device: cpu, cuda, cuda:N, or auto.
        overwrite: discard a run that is already in the output folder.
        recipe_for: models that these settings were tuned for (set by recipes).
    """

    model: str = field(kw_only=True)
    output: Path | None = None
    data: TextWindows = field(default_factory=lambda: TextWindows(count=4096))
    adapter: str | None = None
    device: str = "auto"
    overwrite: bool = False
    recipe_for: tuple[str, ...] = ()


def llm_qat(job: LLMQATJob) -> Path:
    """Run or continue LLM-QAT, alone or as one of a launcher's processes; return the folder of the checkpoint.

    Raises:
        EqatError: any bad input, before anything is written.
    """
    job = job.among(processes())
    require_reporter(job.report_to)
    deepspeed = deepspeed_settings(job)
    if job.reads_text:
        job.data.require_source("--data.source")
    opened = _checked(job)
    stage = STAGE if job.trains else ROUNDED
    folder = job.output or _default_output(job)
    device = best_device(job.device)
    windows = text_windows(load_tokenizer(opened.folder), job.data) if job.reads_text else None
    inputs: dict[str, Path | str] = {"model": opened.folder}
    if windows is not None:
        inputs["data"] = digest_of(windows)
    if windows is not None and job.trains:
        job.check_warmup_of(len(windows), processes())
    room = _room(opened, job)
    with training_run(job, Place.within(folder), stage, inputs, device, deepspeed, room) as (job, arguments, run):
        if not run.finished:
            with watched(job, folder) as watch:
                model, log = _trained(job, opened, windows, arguments, watch)
            if arguments.process_index == 0:
                write_jsonl(folder / "metrics.jsonl", log)
                store(model, opened, job, folder / "model", source=job.model, provenance=run.record)
                run.finish()
                say(f"checkpoint: {folder / 'model'}")
    return folder / "model"


def _room(opened: OpenModel, job: LLMQATJob) -> int:
    """Return the bytes that a run writes at most: its checkpoint, and what three Trainer checkpoints hold."""
    weights = sum(parameter.numel() for parameter in opened.model.parameters())
    return weights * (2 + (3 * 12 if job.trains and job.save_steps else 0))


def _trained(
    job: LLMQATJob,
    opened: OpenModel,
    windows: Tensor | None,
    arguments: transformers.TrainingArguments,
    watch: Watch,
) -> tuple[transformers.PreTrainedModel, list[dict[str, Any]]]:
    """Load the model, quantize and train it; return it with the Trainer's log."""
    model, teacher = _models(job, opened, arguments)
    if windows is not None:
        smooth_model(model, opened.arch, windows, job)
    prepare(model, opened.arch, job)
    if windows is None:
        return model, []
    return model, run_llm_qat(model, WindowDataset(windows), job, arguments, teacher=teacher, watch=watch)


def _default_output(job: LLMQATJob) -> Path:
    return Path("runs") / f"{Path(job.model).name}-{job.widths.name}" / ("llm-qat" if job.trains else "rtn")


def _checked(job: LLMQATJob) -> OpenModel:
    """Open the model.

    Raises:
        EqatError: there is none, or it does not fit the settings.
    """
    opened = open_full_precision(job.model, job.adapter)
    if job.trains:
        warn_without_recipe(job.model, job.recipe_for, "llm-qat", job.bits)
        if takes_images(opened.folder):
            say(f"{job.model} sees; LLM-QAT trains it on text alone")
    check_groups(opened, job.spec)
    return opened


def _models(
    job: LLMQATJob, opened: OpenModel, arguments: transformers.TrainingArguments
) -> tuple[transformers.PreTrainedModel, transformers.PreTrainedModel | None]:
    """Return the model that becomes the student, and the teacher where the loss asks for one."""
    with whole_models(arguments):
        taught = job.trains and job.loss == "logits"
        kept = frozen_dtype(resolve(job.precision, arguments.device), arguments.device)
        teacher = load_model(opened.folder, arguments.device, kept) if taught else None
        student = load_model(opened.folder, arguments.device, "float32")
        opened.arch.split_experts(student)
        return student, teacher
