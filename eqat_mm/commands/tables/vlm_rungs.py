"""The rungs of `eqat demo-vlm`: which models it makes and asks, each with its command.

For every bit width: round-to-nearest; Block-AP, on text; Block-AP + LoRA, the baseline, where asked for; Block-AP +
E2E-QP, on conversations about images, in several processes under DeepSpeed: of the step sizes, and where asked for of
the projector, too; where asked for Block-AP on images and text, and E2E-QP of the step sizes behind that.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch

from eqat_mm.commands.line.recipes import fitting_recipe
from eqat_mm.commands.plumbing.launchers import free_port
from eqat_mm.errors import ConfigError
from eqat_mm.quant.spec import GroupSize, QuantSpec
from eqat_mm.runtime.precision import Precision
from eqat_mm.runtime.settings import Count, Filled, Settings
from eqat_mm.train.losses import Loss

FULL_PRECISION = "full precision"

Bits = Literal[2, 3, 4, 8]


@dataclass(frozen=True)
class VLMLadderJob(Settings):
    """The ladder of stages of a vision-language model.

    Settings of the stages are those of the shipped recipes for the model and bit width.

    Attributes:
        model: full-precision model: folder, alias (`eqat assets`) or hub repository.
        bits: bit widths, one ladder each.
        group_size: weights that share a step size.
        images: adds Block-AP on images and text, and E2E-QP behind it.
        lora: adds the LoRA baseline, on the samples of E2E-QP and for as many steps.
        projector: adds E2E-QP of step sizes and projector together.
        processes: of E2E-QP, under DeepSpeed; null for one on each GPU, two on a CPU.
        steps: of E2E-QP and the baseline, on as many conversations as they take; null for those of the recipe.
        loss: that E2E-QP and the baseline learn by, `cross-entropy` or `kl`; null for that of the recipe.
        conversations: that E2E-QP and the baseline learn from, and Block-AP sees; null takes those of the recipe.
        task: of lmms-eval, whose questions every model is asked; easy_vqa, mini_vqa, or another that gives answers.
        questions: questions each quantized model answers, the first ones; null for all.
        questions_full_precision: the same for the full-precision model, no fewer.
        batch_size: questions per forward.
        precision: of matrix products when questions are answered; null is that of `eqat eval`, bfloat16 is faster where
            the processor has instructions for it.
        output: folder of all runs and of results.json.
        overwrite: discard finished rungs in the output folder.
    """

    model: str = "demo-llava"
    bits: Annotated[tuple[Bits, ...], Filled()] = (2,)
    group_size: GroupSize = 64
    images: bool = False
    lora: bool = False
    projector: bool = False
    processes: Count | None = None
    steps: Count | None = None
    loss: Loss | None = None
    conversations: str | None = None
    task: str = "easy_vqa"
    questions: Count | None = 500
    questions_full_precision: Count | None = 500
    batch_size: Count = 32
    precision: Precision | None = None
    output: Path = Path("runs/demo-vlm")
    overwrite: bool = False

    def check_together(self) -> None:
        """Check that full precision answers whatever the others are compared with it on."""
        most = self.questions_full_precision
        if most is not None and (self.questions is None or most < self.questions):
            given = "all" if self.questions is None else f"{self.questions}"
            raise ConfigError(
                where="--questions_full_precision",
                given=f"{most}, and {given} for the models that are compared with it",
                allowed="no fewer than --questions",
                do="raise it, or set it to null for all",
            )


@dataclass(frozen=True)
class Rung:
    """One row of the table.

    Attributes:
        stage: its name.
        bits: of the weights; 16 for full precision.
        command: what makes it, as arguments; None where nothing is to be made.
        folder: the model, once it is made.
    """

    stage: str
    bits: int
    command: list[str] | None
    folder: Path


def rungs(job: VLMLadderJob, full_precision: Path) -> Iterator[Rung]:
    """Yield the rungs of all ladders, each after those it is made from."""
    yield Rung(FULL_PRECISION, 16, None, full_precision)
    for bits in job.bits:
        yield _rung(job, bits, "round-to-nearest", _eqat("rtn"), "rtn")
        base = _rung(job, bits, "Block-AP", _eqat("block-ap"), "block-ap")
        yield base
        if job.lora:
            yield _tuned(job, base, "Block-AP + LoRA", "lora", "--trains", "lora")
        yield _tuned(job, base, "Block-AP + E2E-QP", "e2e-qp")
        if job.projector:
            yield _tuned(job, base, "E2E-QP + projector", "e2e-qp-projector", "--trains", "scales+projector")
        if job.images:
            seen = _rung(job, bits, "Block-AP on images", _eqat("block-ap"), "block-ap-images", *_seen(job, bits))
            yield seen
            yield _tuned(job, seen, "on images + E2E-QP", "e2e-qp-images")


def _tuned(job: VLMLadderJob, base: Rung, stage: str, name: str, *more: str) -> Rung:
    """Return a rung that is trained on conversations, from the model of another."""
    start = ["--quantized", str(base.folder)]
    if job.conversations is not None:
        start += ["--conversations.source", job.conversations]
    start += _length(job, base.bits) + ([] if job.loss is None else ["--loss", job.loss])
    return _rung(job, base.bits, stage, _deepspeed(job.processes), name, *start, *more)


def _seen(job: VLMLadderJob, bits: int) -> list[str]:
    """Return the options that name the conversations which Block-AP sees: those that E2E-QP learns from."""
    recipe = fitting_recipe("e2e-qp", job.model, str(bits), job.group_size)
    named = {} if recipe is None else dict(recipe.settings.get("conversations", {}))
    if job.conversations is not None:
        named = {"source": job.conversations}
    if "source" not in named:
        raise ConfigError(
            where="--images true",
            given=f"no conversations, and no recipe of {job.model} that names some",
            allowed="conversations about images, in LLaVA's format",
            do="name them with --conversations FILE, or leave --images out",
        )
    places = ("source", "image_folder", "max_length")
    return [word for name in places if name in named for word in (f"--conversations.{name}", str(named[name]))]


def _length(job: VLMLadderJob, bits: int) -> list[str]:
    """Return the options for the ladder's own number of steps, with a conversation for each of their samples."""
    if job.steps is None:
        return []
    recipe = fitting_recipe("e2e-qp", job.model, str(bits), job.group_size)
    batch = None if recipe is None else recipe.settings.get("global_batch")
    count = "null" if batch is None else str(job.steps * batch)
    return ["--max_steps", str(job.steps), "--conversations.count", count]


def _root(job: VLMLadderJob, bits: int) -> Path:
    return job.output / QuantSpec(bits, job.group_size).name


def _rung(job: VLMLadderJob, bits: int, stage: str, launcher: list[str], name: str, *more: str) -> Rung:
    folder = _root(job, bits) / name
    flags = ["--model", job.model, "--quant.bits", str(bits), "--quant.group_size", str(job.group_size)]
    anew = ["--overwrite", "true"] if job.overwrite else []
    return Rung(stage, bits, [*launcher, *flags, "--output", str(folder), *more, *anew], folder / "model")


def _eqat(command: str) -> list[str]:
    return [sys.executable, "-m", "eqat_mm.cli", command]


def _deepspeed(processes: int | None) -> list[str]:
    """Return the launcher of so many processes."""
    processes = processes or torch.cuda.device_count() or 2
    flags = ["--num_gpus", str(processes), "--master_port", str(free_port()), "--no_local_rank"]
    return [sys.executable, "-m", "deepspeed.launcher.runner", *flags, "--module", "eqat_mm.cli", "e2e-qp"]


def asking(rung: Rung, questions: int | None, job: VLMLadderJob, output: Path, reference: Path | None) -> list[str]:
    """Return the command that asks the model of a rung, and compares its answers with those in a file, if given."""
    limit = [] if questions is None else ["--limit", str(questions)]
    beside = [] if reference is None else ["--reference", str(reference)]
    asked = [
        "--model",
        str(rung.folder),
        "--tasks",
        job.task,
        "--likelihood",
        "true",
        "--batch_size",
        str(job.batch_size),
    ]
    asked += [] if job.precision is None else ["--precision", job.precision]
    return [*_eqat("eval"), *asked, *limit, *beside, "--output", str(output)]
