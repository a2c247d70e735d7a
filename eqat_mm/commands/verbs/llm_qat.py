"""`eqat llm-qat`: a full-precision model in, one with quantized weights, activations and KV cache out."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import transformers

from eqat_mm.blocks.source import OpenModel
from eqat_mm.checkpoint.speaker import restyled
from eqat_mm.commands.line.recipes import warn_without_recipe
from eqat_mm.commands.plumbing.deepspeed_file import deepspeed_settings
from eqat_mm.commands.plumbing.end_to_end_job import EndToEndJob
from eqat_mm.commands.plumbing.launchers import training_run, watched, whole_models
from eqat_mm.commands.plumbing.models import load_model
from eqat_mm.commands.plumbing.runs import require_startable
from eqat_mm.commands.plumbing.samples import Samples, checked_samples, problems_of, samples_of
from eqat_mm.commands.verbs.quantize import open_full_precision
from eqat_mm.data.image_text.problems import say_late
from eqat_mm.data.image_text.settings import ImageTextData
from eqat_mm.data.text.settings import TextWindows
from eqat_mm.runtime.device import best_device, processes
from eqat_mm.runtime.files import write_jsonl
from eqat_mm.runtime.place import Place
from eqat_mm.runtime.precision import frozen_dtype, resolve
from eqat_mm.runtime.progress import say
from eqat_mm.runtime.reporting import require_reporter
from eqat_mm.train.block_ap import check_groups
from eqat_mm.train.llm_qat import ROUNDED, STAGE, LLMQATConfig, prepare, run_llm_qat, smooth_model, store
from eqat_mm.train.watch import Watch


@dataclass(frozen=True)
class LLMQATJob(LLMQATConfig, EndToEndJob):
    """LLM-QAT of a model.

    Attributes:
        output: run folder; the checkpoint is `OUTPUT/model`. Default: runs/MODEL-BITS/llm-qat; rtn in place of llm-qat
            where nothing is trained.
        adapter: name of the architecture, where config.json does not decide it.
    """

    # What is nested is declared again: jsonargparse looks for such types in this module.
    data: TextWindows = field(default_factory=lambda: TextWindows(count=4096))
    conversations: ImageTextData | None = None
    adapter: str | None = None


def llm_qat(job: LLMQATJob) -> Path:
    """Run or continue LLM-QAT, alone or as one of a launcher's processes; return the folder of the checkpoint.

    Raises:
        EqatError: any bad input, before anything is written.
    """
    job = job.among(processes())
    require_reporter(job.report_to)
    deepspeed = deepspeed_settings(job)
    if job.reads_data:
        job = job.with_data_decided(job.model)
    if job.trains:
        job.require_judged()
    folder, device = job.output or _default_output(job), best_device(job.device)
    require_startable(job, Place.within(folder))
    opened = _checked(job)
    style = None if job.conversations is None else job.conversations.style
    restyled(opened.folder, style)  # what cannot be stored is found out now
    read = checked_samples if job.trains else samples_of
    samples = read(opened.folder, job, folder) if job.reads_data else None
    inputs: dict[str, Path | str] = {"model": opened.folder}
    if samples is not None:
        inputs["data"] = samples.digest
    stage, room = STAGE if job.trains else ROUNDED, _room(opened, job)
    with training_run(job, Place.within(folder), stage, inputs, device, deepspeed, room) as (job, arguments, run):
        if not run.finished:
            if samples is not None and arguments.process_index == 0:
                samples.keep(folder)
            with watched(job, folder) as watch:
                model, log = _trained(job, opened, samples, arguments, watch)
            if arguments.process_index == 0:
                write_jsonl(folder / "metrics.jsonl", log)
                store(model, opened, job, folder / "model", source=job.model, provenance=run.record, style=style)
                run.finish()
                say_late(problems_of(folder))
                say(f"checkpoint: {folder / 'model'}")
    return folder / "model"


def _room(opened: OpenModel, job: LLMQATJob) -> int:
    """Return the bytes that a run writes at most: its checkpoint, three of the Trainer's, and what was best."""
    weights = sum(parameter.numel() for parameter in opened.model.parameters())
    resumable = 3 * 12 if job.trains and job.save_steps else 0
    return weights * (2 + resumable + (3 * 4 if job.keep_best else 0))


def _trained(
    job: LLMQATJob,
    opened: OpenModel,
    samples: Samples | None,
    arguments: transformers.TrainingArguments,
    watch: Watch,
) -> tuple[transformers.PreTrainedModel, list[dict[str, Any]]]:
    """Load the model, quantize and train it; return it with the Trainer's log."""
    model, teacher = _models(job, opened, arguments)
    held_out = None
    if samples is not None and job.trains:
        held_out = samples.judge(job, arguments)
    if held_out is not None and job.held_out_kl:  # in full precision, this is still what the teacher is
        held_out.record(model, arguments.device, resolve(job.precision, arguments.device))
    if samples is not None:
        smooth_model(model, opened.arch, samples.some(job.smooth_samples), job)
    prepare(model, opened.arch, job)
    if samples is None:
        return model, []
    given: dict[str, Any] = {"blank": samples.blank(), "collator": samples.collator, "order": samples.order}
    given |= {"teacher": teacher, "watch": watch, "held_out": held_out}
    return model, run_llm_qat(model, samples.dataset, job, arguments, **given)


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
    check_groups(opened, job.spec)
    return opened


def _models(
    job: LLMQATJob, opened: OpenModel, arguments: transformers.TrainingArguments
) -> tuple[transformers.PreTrainedModel, transformers.PreTrainedModel | None]:
    """Return the model that becomes the student, and the teacher where the loss asks for one."""
    with whole_models(arguments):
        taught = job.trains and job.loss == "kl"
        kept = frozen_dtype(resolve(job.precision, arguments.device), arguments.device)
        teacher = load_model(opened.folder, arguments.device, kept) if taught else None
        student = load_model(opened.folder, arguments.device, "float32")
        opened.arch.split_experts(student)
        return student, teacher
