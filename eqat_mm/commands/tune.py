"""`eqat e2e-qp`: a packed checkpoint in, the same with trained step sizes out."""

from __future__ import annotations

import os
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import transformers
from torch import Tensor

from eqat_mm.checkpoint.adapters import add_adapters, require_peft
from eqat_mm.checkpoint.manifest import MANIFEST, read_manifest
from eqat_mm.checkpoint.read import load
from eqat_mm.checkpoint.speaker import restyled
from eqat_mm.checkpoint.verify import verify_checkpoint
from eqat_mm.checkpoint.write import save_like
from eqat_mm.commands.deepspeed_file import deepspeed_settings
from eqat_mm.commands.launchers import training_run, watched, whole_models
from eqat_mm.commands.models import load_model, model_folder, require_teacher
from eqat_mm.commands.one_kind import with_one_kind_of_data
from eqat_mm.commands.preflight import announce_e2e_qp
from eqat_mm.commands.recipes import warn_without_recipe
from eqat_mm.commands.runs import default_output, require_startable
from eqat_mm.commands.samples import Samples, image_text_samples, problems_of, text_samples
from eqat_mm.data.image_text import ImageTextData
from eqat_mm.data.kept import Kept
from eqat_mm.data.problems import say_late
from eqat_mm.data.text_settings import TextWindows
from eqat_mm.errors import CheckpointError, ConfigError, DataError
from eqat_mm.quant.spec import QuantSpec
from eqat_mm.runtime.device import best_device, processes
from eqat_mm.runtime.files import write_jsonl
from eqat_mm.runtime.place import Place
from eqat_mm.runtime.precision import frozen_dtype, resolve
from eqat_mm.runtime.progress import say
from eqat_mm.runtime.reporting import require_reporter
from eqat_mm.train.e2e_qp import STAGE, E2EQPConfig, run_e2e_qp
from eqat_mm.train.held_out import HeldOut
from eqat_mm.train.imageless import blank_image
from eqat_mm.train.watch import Watch
from llava_adapters import arch_for

_INSTRUCTIONS = {
    "llava_v1_5_mix665k.json": "liuhaotian/LLaVA-Instruct-150K",
    "blip_laion_cc_sbu_558k.json": "liuhaotian/LLaVA-Pretrain",
}
"""Published instruction data and the repository it is in."""


@dataclass(frozen=True)
class E2EQPJob(E2EQPConfig):
    """E2E-QP of a packed model.

    Attributes:
        model: the full-precision model it was made from: names the default folders, teaches with `loss: kl`.
        quant: finds the default Block-AP run of `model`; the checkpoint itself knows its spec.
        quantized: packed checkpoint to start from. Default: runs/MODEL-SPEC/block-ap/model.
        output: run folder; the checkpoint is `OUTPUT/model`. Default: runs/MODEL-SPEC/e2e-qp; lora or
            projector in place of e2e-qp where step sizes are not trained.
        data: text to train on.
        conversations: conversations about images to train on instead, with a vision-language model.
        text_only: train a vision-language model on text alone, whatever conversations a recipe names.
        device: cpu, cuda, cuda:N, or auto.
        overwrite: discard a run that is already in the output folder.
        recipe_for: models that these settings were tuned for (set by recipes).
    """

    model: str = field(kw_only=True)
    quant: QuantSpec = field(default_factory=QuantSpec)
    quantized: Path | None = None
    output: Path | None = None
    data: TextWindows = field(default_factory=lambda: TextWindows(length=4096, count=4096))
    conversations: ImageTextData | None = None
    text_only: bool = False
    device: str = "auto"
    overwrite: bool = False
    recipe_for: tuple[str, ...] = ()


def e2e_qp(job: E2EQPJob) -> Path:
    """Run or continue E2E-QP, alone or as one of a launcher's processes; return the folder of the checkpoint.

    Raises:
        EqatError: any bad input, before anything is written.
    """
    job = job.among(processes())
    require_reporter(job.report_to)
    deepspeed = deepspeed_settings(job)
    runs = default_output(job.model, job.quant)
    base = job.quantized or runs / "block-ap" / "model"
    job = with_one_kind_of_data(job, base)
    stage = STAGE if "scales" in job.trains else job.trains.partition("+")[0]
    folder, device = job.output or runs / stage, best_device(job.device)
    plan = announce_e2e_qp(base, job.model, job.quant, job, job.conversations or job.data, device, folder)
    _require_block_ap(base, job)
    warn_without_recipe(job.model, job.recipe_for, STAGE)
    require_startable(job, Place.within(folder))
    if _adapts(job):
        require_peft(f"--trains {job.trains}")
    inputs: dict[str, Path | str] = {"quantized": base}
    _require_judged(job)
    if job.loss == "kl":
        inputs["model"] = require_teacher(model_folder(job.model))
    elif _judges_by_full_precision(job):
        require_teacher(model_folder(job.model))
    style = {} if job.conversations is None else restyled(base, job.conversations.style)
    samples = _samples(base, job, folder)
    job.check_warmup_of(len(samples.dataset), processes())  # type: ignore[arg-type]
    verify_checkpoint(base)
    inputs["data"] = samples.digest
    room = 2 * sum(path.stat().st_size for path in base.iterdir() if path.is_file())
    given: dict[str, Any] = {"inputs": inputs, "device": device, "deepspeed": deepspeed, "room": room, "plan": plan}
    with training_run(job, Place.within(folder), STAGE, **given) as (job, arguments, run):
        if not run.finished:
            if arguments.process_index == 0:
                samples.keep(folder)
            with watched(job, folder) as watch:
                model, log = _trained(job, base, samples, arguments, watch)
            if arguments.process_index == 0:
                write_jsonl(folder / "metrics.jsonl", log)
                save_like(model, folder / "model", base, stage, run.record, style)
                run.finish()
                say_late(problems_of(folder))
                say(f"checkpoint: {folder / 'model'}")
    return folder / "model"


def _trained(
    job: E2EQPJob, base: Path, samples: Samples, arguments: transformers.TrainingArguments, watch: Watch
) -> tuple[transformers.PreTrainedModel, list[dict[str, Any]]]:
    """Load the packed model, train it; return it with the Trainer's log."""
    held_out = _held_out(job, samples, arguments)
    with whole_models(arguments):
        kept = frozen_dtype(resolve(job.precision, arguments.device), arguments.device)
        teacher = load_model(model_folder(job.model), arguments.device, kept) if job.loss == "kl" else None
        if held_out is not None and _judges_by_full_precision(job):
            judge = teacher or load_model(model_folder(job.model), arguments.device, kept)
            held_out.record(judge, arguments.device, resolve(job.precision, arguments.device))
            del judge
        model = load(base, dtype=kept, device=arguments.device, verify=False)
    if _adapts(job):
        add_adapters(model, job.lora.rank, job.lora.alpha, job.seed)
    projector = arch_for(read_manifest(base).arch, f"{base}: the adapter that made it").find_projector(model)
    given: dict[str, Any] = {"blank": _blank(samples), "collator": samples.collator, "order": samples.order}
    given |= {"teacher": teacher, "projector": projector, "watch": watch, "held_out": held_out}
    return model, run_e2e_qp(model, samples.dataset, job, arguments, **given)


def _held_out(job: E2EQPJob, samples: Samples, arguments: transformers.TrainingArguments) -> HeldOut | None:
    if samples.held_out is None:
        return None
    place = {"rank": arguments.process_index, "world": arguments.world_size}
    return HeldOut.of(samples.held_out, samples.collator, job.held_out_steps, job.batch_size, **place)


def _judged(job: E2EQPJob) -> bool:
    """Whether conversations are held out."""
    config = job.conversations
    return config is not None and bool(config.held_out or config.held_out_source)


def _judges_by_full_precision(job: E2EQPJob) -> bool:
    return _judged(job) and job.held_out_kl


def _require_judged(job: E2EQPJob) -> None:
    if job.keep_best and not _judged(job):
        raise ConfigError(
            where="--keep_best true",
            given="no held-out conversations",
            allowed="conversations to judge every step by",
            do="add --conversations.held_out 256, or leave --keep_best out",
        )


def _adapts(job: E2EQPJob) -> bool:
    return "lora" in job.trains.split("+")


def _samples(base: Path, job: E2EQPJob, folder: Path) -> Samples:
    if job.conversations is None:
        return text_samples(base, job.data)
    _require_instructions(job.conversations)
    step = job.batch_size * job.accumulation * processes()
    before = None if job.overwrite else Kept.open(folder)
    return image_text_samples(base, job.conversations, step, problems_of(folder), before)


def _require_instructions(config: ImageTextData) -> None:
    """Check that LLaVA's instruction data and images are there, where they are named; other data is read as it is.

    Raises:
        DataError: one of them is missing.
    """
    file = Path(os.path.expanduser(config.source))
    if file.name not in _INSTRUCTIONS:
        return
    if not file.is_file():
        fetch = ["hf", "download", _INSTRUCTIONS[file.name], file.name]
        raise DataError(
            where=f"--conversations.source {config.source}",
            given="no such file",
            allowed="LLaVA's instruction data, or your own in its format",
            do=f"{shlex.join([*fetch, '--repo-type', 'dataset', '--local-dir', str(file.parent)])}, or name another",
        )
    if config.image_folder is not None and not config.image_folder.is_dir():
        raise DataError(
            where=f"--conversations.image_folder {config.image_folder}",
            given="no such folder",
            allowed=f"the folder that image paths in {file.name} are relative to",
            do="fetch the images with the commands in docs/llava.md, or name the folder where they are",
        )


def _blank(samples: Samples) -> dict[str, Tensor] | None:
    """Return the tensors of an image without content, where some samples have images and some have not."""
    data: Any = samples.dataset
    if not 0 < samples.without_images < len(data):
        return None
    return blank_image(data[list(data.text_only).index(False)])


def _require_block_ap(base: Path, job: E2EQPJob) -> None:
    if (base / MANIFEST).is_file():
        return
    makes = f"make it first: {_block_ap_command(base, job)}, or name one with --quantized"
    raise CheckpointError(
        where=f"--quantized {base}",
        given="no packed checkpoint there",
        allowed="the output of Block-AP (or of round-to-nearest)",
        do=makes if base.name == "model" else "check the path: it is the folder `model` of a run",
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
