"""`eqat e2e-qp`: a packed checkpoint in, the same with trained step sizes out."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import transformers
from torch import nn

from eqat_mm.checkpoint.adapters import add_adapters, require_peft
from eqat_mm.checkpoint.manifest import MANIFEST, checkpoint_folder, read_manifest
from eqat_mm.checkpoint.read import load
from eqat_mm.checkpoint.speaker import restyled
from eqat_mm.checkpoint.verify import verify_checkpoint
from eqat_mm.checkpoint.write import save_like
from eqat_mm.commands.line.recipes import warn_without_recipe
from eqat_mm.commands.plumbing.deepspeed_file import deepspeed_settings
from eqat_mm.commands.plumbing.end_to_end_job import EndToEndJob
from eqat_mm.commands.plumbing.launchers import training_run, watched, whole_models
from eqat_mm.commands.plumbing.models import model_folder, require_teacher
from eqat_mm.commands.plumbing.preflight import announce_e2e_qp
from eqat_mm.commands.plumbing.runs import default_output, require_startable, settled
from eqat_mm.commands.plumbing.samples import Samples, checked_samples, problems_of
from eqat_mm.commands.plumbing.teacher import hidden_states_of, in_memory, kept_or_in_memory, require_cacheable
from eqat_mm.data.image_text.problems import say_late
from eqat_mm.data.image_text.settings import ImageTextData
from eqat_mm.data.text.settings import TextWindows
from eqat_mm.errors import CheckpointError
from eqat_mm.quant.spec import QuantSpec
from eqat_mm.runtime.device import best_device, processes
from eqat_mm.runtime.files import write_jsonl
from eqat_mm.runtime.place import Place
from eqat_mm.runtime.precision import frozen_dtype, resolve
from eqat_mm.runtime.progress import say
from eqat_mm.runtime.reporting import require_reporter
from eqat_mm.train.e2e_qp import STAGE, E2EQPConfig, run_e2e_qp
from eqat_mm.train.kept_teacher import KeptTeacher
from eqat_mm.train.watch import Watch
from llava_adapters import arch_for


@dataclass(frozen=True)
class E2EQPJob(E2EQPConfig, EndToEndJob):
    """E2E-QP of a packed model.

    Attributes:
        model: the full-precision model; it names the default folders, and teaches with `loss: kl`.
        quant: finds the default Block-AP run of `model`; the checkpoint itself knows its spec.
        quantized: packed checkpoint, or its run, to start from. Default: runs/MODEL-SPEC/block-ap/model.
        output: run folder; the checkpoint is `OUTPUT/model`. Default: runs/MODEL-SPEC/e2e-qp; lora or
            projector in place of e2e-qp where step sizes are not trained.
        data: text to train on.
    """

    quant: QuantSpec = field(default_factory=QuantSpec)
    quantized: Path | None = None
    data: TextWindows = field(default_factory=lambda: TextWindows(length=4096, count=4096))


def e2e_qp(job: E2EQPJob) -> Path:
    """Run or continue E2E-QP, alone or as one of a launcher's processes; return the folder of the checkpoint.

    Raises:
        EqatError: any bad input, before anything is written.
    """
    job = job.among(processes())
    require_reporter(job.report_to)
    deepspeed = deepspeed_settings(job)
    runs = default_output(job.model, job.quant)
    base = checkpoint_folder(job.quantized or runs / "block-ap" / "model")
    job = job.with_data_decided(str(base), job.model)
    stage = stage_of(job)
    folder, device = job.output or runs / stage, best_device(job.device)
    plan = announce_e2e_qp(base, job.model, job.quant.resolved(), job, _heaviest(job), device, folder)
    _require_block_ap(base, job)
    warn_without_recipe(job.model, job.recipe_for, STAGE)
    require_startable(job, Place.within(folder))
    if "lora" in job.trained:
        require_peft(f"--trains {job.trains}")
    require_cacheable(job, base, 0 if deepspeed is None else deepspeed.stage)
    inputs: dict[str, Path | str] = {"quantized": base}
    job.require_judged()
    if job.loss == "kl":
        inputs["model"] = require_teacher(model_folder(job.model))
    elif job.judged_by_full_precision:
        require_teacher(model_folder(job.model))
    style = {} if job.conversations is None else restyled(base, job.conversations.style)
    samples = checked_samples(base, job, folder)
    verify_checkpoint(base)
    inputs["data"] = samples.digest
    if job.loss == "kl":
        choices = {"teacher": lambda: kept_or_in_memory(job, base, samples, folder, device)}
        job = settled(job, Place.within(folder), choices)
    room = 2 * sum(path.stat().st_size for path in base.iterdir() if path.is_file())
    given: dict[str, Any] = {"inputs": inputs, "device": device, "deepspeed": deepspeed, "room": room, "plan": plan}
    with training_run(job, Place.within(folder), STAGE, **given) as (job, arguments, run):
        if not run.finished:
            if arguments.process_index == 0:
                samples.keep(folder)
            with watched(job, folder) as watch:
                model, log = _trained(job, base, samples, arguments, watch, folder)
            if arguments.process_index == 0:
                write_jsonl(folder / "metrics.jsonl", log)
                save_like(model, folder / "model", base, stage, run.record, style)
                run.finish()
                say_late(problems_of(folder))
                say(f"checkpoint: {folder / 'model'}")
    return folder / "model"


def stage_of(job: E2EQPConfig) -> str:
    """Return the name of what a job makes, and of its default folder: `e2e-qp`, or what else it trains."""
    return STAGE if "scales" in job.trained else "lora" if "lora" in job.trained else "projector"


def _trained(
    job: E2EQPJob, base: Path, samples: Samples, arguments: transformers.TrainingArguments, watch: Watch, folder: Path
) -> tuple[transformers.PreTrainedModel, list[dict[str, Any]]]:
    """Load the packed model, train it; return it with the Trainer's log."""
    held_out = samples.judge(job, arguments)
    with whole_models(arguments):
        kept = frozen_dtype(resolve(job.precision, arguments.device), arguments.device)
        cached = hidden_states_of(job, samples, arguments, folder) if job.teacher == "cache" else None
        teacher: nn.Module | None = in_memory(job, arguments) if job.loss == "kl" and cached is None else None
        if held_out is not None and job.judged_by_full_precision:
            judge = teacher or in_memory(job, arguments)
            held_out.record(judge, arguments.device, resolve(job.precision, arguments.device))
            del judge
        model = load(base, dtype=kept, device=arguments.device, verify=False)
    if cached is not None:
        teacher = KeptTeacher(model, samples.dataset.windows, cached)
    if "lora" in job.trained:
        add_adapters(model, job.lora.rank, job.lora.alpha, job.seed)
    projector = arch_for(read_manifest(base).arch, f"{base}: the adapter that made it").find_projector(model)
    given: dict[str, Any] = {"blank": samples.blank(), "collator": samples.collator, "order": samples.order}
    given |= {"teacher": teacher, "projector": projector, "watch": watch, "held_out": held_out}
    return model, run_e2e_qp(model, samples.dataset, job, arguments, **given)


def _heaviest(job: E2EQPJob) -> TextWindows | ImageTextData:
    """Return the data by which a run is planned; of both kinds, conversations as long as the longest window."""
    if job.conversations is None or job.text_share is None:
        return job.conversations or job.data
    return replace(job.conversations, max_length=max(job.conversations.max_length, job.data.length))


def _require_block_ap(base: Path, job: E2EQPJob) -> None:
    if (base / MANIFEST).is_file():
        return
    makes = f"make it first: {_block_ap_command(base, job)}, or name one with --quantized"
    raise CheckpointError(
        where=f"--quantized {base}",
        given="no packed checkpoint there",
        allowed="the output of Block-AP (or of round-to-nearest)",
        do=makes if base.name == "model" else "check the path: a run, or the folder `model` in it",
    )


def _block_ap_command(base: Path, job: E2EQPJob) -> str:
    """Return the command that makes the checkpoint `base`."""
    words = ["eqat", "block-ap", "--model", job.model]
    for name, value in job.quant.as_dict().items():
        if value != getattr(QuantSpec, name):
            words += [f"--quant.{name}", str(value).lower() if isinstance(value, bool) else str(value)]
    if job.quantized is not None:
        words += ["--output", str(base.parent)]
    return shlex.join(words)
