"""`eqat demo-vlm`: the ladder of stages on a vision-language model, as commands.

For every bit width: round-to-nearest; Block-AP, on text; Block-AP + LoRA, the baseline, where asked for; Block-AP +
E2E-QP, on conversations about images, in several processes under DeepSpeed. Every rung is judged by the command line of
lmms-eval. Each command is printed as it could be typed, and continues or skips what an earlier start of it has done; so
does the ladder.
"""

from __future__ import annotations

import os
import secrets
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from eqat_mm.commands.plumbing.launchers import free_port
from eqat_mm.commands.plumbing.lmms import require_lmms_eval, task_row, tasks_folders
from eqat_mm.commands.plumbing.models import model_folder, require_model
from eqat_mm.commands.plumbing.runs import model_fingerprint, seconds_of, settings, slug
from eqat_mm.commands.tables.table import Row, Table
from eqat_mm.commands.verbs.evaluate import bits_per_weight
from eqat_mm.errors import TrainingError
from eqat_mm.quant.spec import GroupSize, QuantSpec
from eqat_mm.runtime.children import run_child
from eqat_mm.runtime.files import read_json
from eqat_mm.runtime.plugins import GUESSES, plugged_function
from eqat_mm.runtime.progress import duration, say
from eqat_mm.runtime.provenance import provenance
from eqat_mm.runtime.settings import Count, Filled, Settings

TASK = "easy_vqa"
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
        lora: adds the LoRA baseline, on the samples of E2E-QP and for as many steps.
        processes: of E2E-QP, under DeepSpeed.
        questions: questions of easy_vqa each quantized model answers, the first ones; null for all.
        questions_full_precision: the same for the full-precision model.
        batch_size: questions per forward.
        output: folder of all runs and of results.json.
        overwrite: discard finished rungs in the output folder.
    """

    model: str = "demo-llava"
    bits: Annotated[tuple[Bits, ...], Filled()] = (2,)
    group_size: GroupSize = 64
    lora: bool = False
    processes: Count = 2
    questions: Count | None = 500
    questions_full_precision: Count | None = 500
    batch_size: Count = 32
    output: Path = Path("runs/demo-vlm")
    overwrite: bool = False


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
    blind = blind_accuracy()
    head = {"model": job.model, "group_size": job.group_size, "blind_accuracy": blind}
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
        yield _rung(job, bits, "round-to-nearest", _eqat("rtn"), "rtn")
        yield _rung(job, bits, "Block-AP", _eqat("block-ap"), "block-ap")
        if job.lora:
            yield _rung(job, bits, "Block-AP + LoRA", _deepspeed(job.processes), "lora", *start, "--trains", "lora")
        yield _rung(job, bits, "Block-AP + E2E-QP", _deepspeed(job.processes), "e2e-qp", *start)


def _root(job: VLMLadderJob, bits: Bits) -> Path:
    return job.output / QuantSpec(bits, job.group_size).name


def _rung(job: VLMLadderJob, bits: Bits, stage: str, launcher: list[str], name: str, *more: str) -> Rung:
    folder = _root(job, bits) / name
    flags = ["--model", job.model, "--quant.bits", str(bits), "--quant.group_size", str(job.group_size)]
    anew = ["--overwrite", "true"] if job.overwrite else []
    return Rung(stage, bits, [*launcher, *flags, "--output", str(folder), *more, *anew], folder / "model")


def _eqat(command: str) -> list[str]:
    return [sys.executable, "-m", "eqat_mm.cli", command]


def _deepspeed(processes: int) -> list[str]:
    """Return the launcher of so many processes."""
    flags = ["--num_gpus", str(processes), "--master_port", str(free_port()), "--no_local_rank"]
    return [sys.executable, "-m", "deepspeed.launcher.runner", *flags, "--module", "eqat_mm.cli", "e2e-qp"]


def _ask(made: Table, rung: Rung, job: VLMLadderJob) -> None:
    """Ask the model of a rung the questions of easy_vqa."""
    questions = job.questions_full_precision if rung.stage == FULL_PRECISION else job.questions
    key = f"{rung.stage} {rung.bits} {questions or 'all'}"
    decides = {"model": model_fingerprint(rung.folder), "task": TASK, "questions": questions}
    output = made.root / "eval" / slug(key) / "lmms-eval" / secrets.token_hex(4)

    def about(verdict: Row) -> Row:
        answered = {name: verdict[name] for name in ("accuracy", "questions", "by_type")}
        made_of = {"bits_per_weight": bits_per_weight(rung.folder), "seconds": round(seconds_of(rung.folder), 1)}
        return {"bits": rung.bits, "stage": rung.stage} | answered | made_of

    made.add(key, decides, lambda: _answered(rung.folder, questions, job.batch_size, output), about)


def _answered(model: Path, questions: int | None, batch_size: int, output: Path) -> Row:
    """Return `task_row` of easy_vqa for a model, asked by the command line of lmms-eval."""
    limit = [] if questions is None else ["--limit", str(questions)]
    asked = ["--model", "eqat", "--model_args", f"pretrained={model}", "--batch_size", str(batch_size)]
    task = ["--include_path", *tasks_folders(), "--tasks", TASK, *limit]
    run_command([sys.executable, "-m", "lmms_eval", *asked, *task, "--output_path", str(output)])
    (file,) = output.rglob("*_results.json")
    found = read_json(file)
    return task_row(found["results"][TASK], found["n-samples"][TASK])


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


def blind_accuracy() -> float:
    """Return the accuracy that is to be had without looking at the images."""
    return float(plugged_function(GUESSES, TASK)())


def table(rows: Sequence[dict[str, Any]], blind: float) -> str:
    """Return the rows as lines of text."""
    lines = [f"{'bits':>4}  {'stage':<20}{'bits/weight':>12}{'accuracy':>10}{'questions':>11}{'time':>8}"]
    for row in rows:
        stored = "" if row["bits_per_weight"] is None else f"{row['bits_per_weight']:.2f}"
        lines.append(
            f"{row['bits']:>4}  {row['stage']:<20}{stored:>12}{row['accuracy']:>10.1%}{row['questions']:>11,}"
            f"{duration(row['seconds']):>8}"
        )
    return "\n".join([*lines, f"      {'guessing blind':<20}{'':>12}{blind:>10.1%}"])
