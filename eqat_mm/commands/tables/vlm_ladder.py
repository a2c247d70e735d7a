"""`eqat demo-vlm`: the ladder of stages on a vision-language model, as commands.

Every rung (`vlm_rungs.py`) is made, then asked the questions of a task of lmms-eval. Each command is printed as it
could be typed, and continues or skips what an earlier start of it has done; so does the ladder.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from eqat_mm.commands.plumbing.answers import predictions_of
from eqat_mm.commands.plumbing.lmms import require_lmms_eval
from eqat_mm.commands.plumbing.models import model_folder, require_model
from eqat_mm.commands.plumbing.runs import model_fingerprint, seconds_of, settings, slug
from eqat_mm.commands.tables.table import Row, Table
from eqat_mm.commands.tables.vlm_rungs import FULL_PRECISION, Rung, VLMLadderJob, asking, rungs
from eqat_mm.commands.verbs.evaluate import bits_per_weight
from eqat_mm.errors import TrainingError
from eqat_mm.runtime.children import run_child
from eqat_mm.runtime.files import read_json
from eqat_mm.runtime.plugins import GUESSES, plugged, plugged_function
from eqat_mm.runtime.progress import duration, say
from eqat_mm.runtime.provenance import provenance

_ANSWERED = ("accuracy", "questions", "by_type", "metrics", "nll", "kl", "flips")
"""What a row says of the answers, as far as it was measured."""


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
