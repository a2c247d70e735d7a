"""`eqat demo-vlm`: the ladder of stages on a vision-language model, as commands.

For every bit width: round-to-nearest; Block-AP, on text; where asked for on images and text; Block-AP + LoRA, the
baseline, where asked for; Block-AP + E2E-QP, on conversations about images, in several processes under DeepSpeed: of
the step sizes, and where asked for of the projector, too. Every rung is asked the questions of a task of lmms-eval.
Each command is printed as it could be typed, and continues or skips what an earlier start of it has done; so does the
ladder.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch

from eqat_mm.commands.line.recipes import fitting_recipe
from eqat_mm.commands.plumbing.answers import predictions_of
from eqat_mm.commands.plumbing.launchers import free_port
from eqat_mm.commands.plumbing.lmms import require_lmms_eval
from eqat_mm.commands.plumbing.models import model_folder, require_model
from eqat_mm.commands.plumbing.runs import model_fingerprint, seconds_of, settings, slug
from eqat_mm.commands.tables.table import Row, Table
from eqat_mm.commands.verbs.evaluate import bits_per_weight
from eqat_mm.errors import ConfigError, TrainingError
from eqat_mm.quant.spec import GroupSize, QuantSpec
from eqat_mm.runtime.children import run_child
from eqat_mm.runtime.files import read_json
from eqat_mm.runtime.plugins import GUESSES, plugged, plugged_function
from eqat_mm.runtime.precision import Precision
from eqat_mm.runtime.progress import duration, say
from eqat_mm.runtime.provenance import provenance
from eqat_mm.runtime.settings import Count, Filled, Settings
from eqat_mm.train.losses import Loss

FULL_PRECISION = "full precision"
_ANSWERED = ("accuracy", "questions", "by_type", "metrics", "nll", "kl", "flips")
"""What a row says of the answers, as far as it was measured."""

Bits = Literal[2, 3, 4, 8]


@dataclass(frozen=True)
class VLMLadderJob(Settings):
    """The ladder of stages of a vision-language model.

    Settings of the stages are those of the shipped recipes for the model and bit width.

    Attributes:
        model: full-precision model: folder, alias (`eqat assets`) or hub repository.
        bits: bit widths, one ladder each.
        group_size: weights that share a step size.
        images: adds Block-AP on images and text.
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


def vlm_ladder(job: VLMLadderJob) -> list[dict[str, Any]]:
    """Climb the ladder; print the table, write `results.json`, and return its rows.

    Raises:
        EqatError: bad input, or a command that failed.
    """
    require_lmms_eval()
    folder = model_folder(job.model)
    require_model(folder)
    blind = blind_accuracy(job.task)
    head = {"model": job.model, "group_size": job.group_size, "task": job.task, "blind_accuracy": blind}
    made_by = {"provenance": provenance("demo-vlm", settings(job), 0)}
    made = Table(
        job.output,
        "demo-vlm",
        lambda rows: head | {"rows": rows} | made_by,
        lambda rows: table(rows, blind),
        anew=job.overwrite,
    )
    for rung in rungs(job, folder):
        say(f"== {rung.stage}, {rung.bits} bits")
        if rung.command is not None:
            run_command(rung.command)
        _ask(made, rung, job)
    return made.rows


def rungs(job: VLMLadderJob, full_precision: Path) -> Iterator[Rung]:
    """Yield the rungs of all ladders, each after those it is made from."""
    yield Rung(FULL_PRECISION, 16, None, full_precision)
    for bits in job.bits:
        start = ["--quantized", str(_root(job, bits) / "block-ap" / "model")]
        if job.conversations is not None:
            start += ["--conversations.source", job.conversations]
        start += _length(job, bits) + ([] if job.loss is None else ["--loss", job.loss])
        yield _rung(job, bits, "round-to-nearest", _eqat("rtn"), "rtn")
        yield _rung(job, bits, "Block-AP", _eqat("block-ap"), "block-ap")
        if job.images:
            yield _rung(job, bits, "Block-AP on images", _eqat("block-ap"), "block-ap-images", *_seen(job, bits))
        if job.lora:
            yield _rung(job, bits, "Block-AP + LoRA", _deepspeed(job.processes), "lora", *start, "--trains", "lora")
        yield _rung(job, bits, "Block-AP + E2E-QP", _deepspeed(job.processes), "e2e-qp", *start)
        if job.projector:
            more = [*start, "--trains", "scales+projector"]
            yield _rung(job, bits, "E2E-QP + projector", _deepspeed(job.processes), "e2e-qp-projector", *more)


def _seen(job: VLMLadderJob, bits: Bits) -> list[str]:
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


def _length(job: VLMLadderJob, bits: Bits) -> list[str]:
    """Return the options for the ladder's own number of steps, with a conversation for each of their samples."""
    if job.steps is None:
        return []
    recipe = fitting_recipe("e2e-qp", job.model, str(bits), job.group_size)
    batch = None if recipe is None else recipe.settings.get("global_batch")
    count = "null" if batch is None else str(job.steps * batch)
    return ["--max_steps", str(job.steps), "--conversations.count", count]


def _root(job: VLMLadderJob, bits: Bits) -> Path:
    return job.output / QuantSpec(bits, job.group_size).name


def _rung(job: VLMLadderJob, bits: Bits, stage: str, launcher: list[str], name: str, *more: str) -> Rung:
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


def _ask(made: Table, rung: Rung, job: VLMLadderJob) -> None:
    """Ask the model of a rung the questions of the task, and compare its answers with those of full precision."""
    full = _answers(made.root, FULL_PRECISION, 16, job.questions_full_precision)
    is_full = rung.stage == FULL_PRECISION
    questions = job.questions_full_precision if is_full else job.questions
    output = _answers(made.root, rung.stage, rung.bits, questions)
    reference = None if is_full else full
    decides = {
        "model": model_fingerprint(rung.folder),
        "task": job.task,
        "questions": questions,
        "beside": "likelihood",
    }
    decides |= {} if job.precision is None else {"precision": job.precision}
    key = _key(rung.stage, rung.bits, questions)
    lost = is_full and not predictions_of(full).is_file()
    made.add(key, decides, lambda: _answered(rung, questions, job, output, reference), partial(row_of, rung), anew=lost)


def row_of(rung: Rung, verdict: Row) -> Row:
    """Return the row of the table that says what a rung is, and what `eqat eval` found of the task."""
    answered = {name: verdict[name] for name in _ANSWERED if name in verdict}
    made_of = {"bits_per_weight": bits_per_weight(rung.folder), "seconds": round(seconds_of(rung.folder), 1)}
    return {"bits": rung.bits, "stage": rung.stage} | answered | made_of


def _key(stage: str, bits: int, questions: int | None) -> str:
    return f"{stage} {bits} {questions or 'all'}"


def _answers(root: Path, stage: str, bits: int, questions: int | None) -> Path:
    """Return the file in which the result of a rung is, its answers beside it."""
    return root / "eval" / slug(_key(stage, bits, questions)) / "asked.json"


def _answered(rung: Rung, questions: int | None, job: VLMLadderJob, output: Path, reference: Path | None) -> Row:
    run_command(asking(rung, questions, job, output, reference))
    return verdict_in(output, job)


def verdict_in(output: Path, job: VLMLadderJob) -> Row:
    """Return what `eqat eval` wrote of the task."""
    found: Row = read_json(output)["tasks"][job.task]
    return found


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


def run_command(words: list[str]) -> None:
    """Run a command in a process of its own, one thread for each core divided among its processes.

    Raises:
        TrainingError: it failed; it has said why.
    """
    say(f"$ {shlex.join(words)}")
    status = run_child(words, _environment(words))
    if status != 0:
        raise TrainingError(
            where=shlex.join(words),
            given=f"exit status {status}",
            allowed="a command that succeeds",
            do="see what it said above; the same ladder goes on from here",
        )


def _environment(words: list[str]) -> dict[str, str]:
    processes = int(words[words.index("--num_gpus") + 1]) if "--num_gpus" in words else 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {"OMP_NUM_THREADS": str(max(1, cores // processes))} | dict(os.environ)


def blind_accuracy(task: str) -> float | None:
    """Return the accuracy that is to be had without looking at the images; None where nobody has told."""
    return float(plugged_function(GUESSES, task)()) if task in plugged(GUESSES) else None


def table(rows: Sequence[dict[str, Any]], blind: float | None) -> str:
    """Return the rows as lines of text: accuracy and flips as shares, NLL an answer and KL a token in nats."""
    names = f"{'bits/weight':>12}{'accuracy':>10}{'NLL':>8}{'KL':>8}{'flips':>8}{'questions':>11}{'time':>8}"
    lines = [f"{'bits':>4}  {'stage':<20}{names}"]
    for row in rows:
        cells = (("bits_per_weight", 12, ".2f"), ("accuracy", 10, ".1%"), ("nll", 8, ".3f"), ("kl", 8, ".3f"))
        measured = "".join(_cell(row, *cell) for cell in (*cells, ("flips", 8, ".1%")))
        asked = f"{row['questions']:>11,}{duration(row['seconds']):>8}"
        lines.append(f"{row['bits']:>4}  {row['stage']:<20}{measured}{asked}")
    guessed = [] if blind is None else [f"      {'guessing blind':<20}{'':>12}{blind:>10.1%}"]
    return "\n".join([*lines, *guessed])


def _cell(row: dict[str, Any], name: str, width: int, form: str) -> str:
    value = row.get(name)
    return f"{'' if value is None else format(value, form):>{width}}"
