"""`eqat eval --tasks`: tasks of lmms-eval and of packages that plug in, on one model folder."""

from __future__ import annotations

import argparse
import difflib
import importlib.util
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from eqat_mm.commands.plumbing.answers import Answers, compared, measure_likelihoods, records_of
from eqat_mm.data.image_text.style import Style
from eqat_mm.errors import ConfigError
from eqat_mm.runtime.plugins import plugged_folders
from eqat_mm.runtime.precision import Precision

SCORE = "exact_match"
"""Metric that is reported as the accuracy; with a suffix it is that of one type of question."""

_COMPARED = {"nll": ".4f", "kl": ".4f", "flips": ".1%"}

SUITES = {"llava-1.5": ("mme", "pope", "gqa", "textvqa_val", "scienceqa_img", "mmbench_en_dev_static")}
"""Names for several tasks: those of the LLaVA-1.5 paper that no outside service scores."""


def task_names(tasks: str) -> list[str]:
    """Return the names in a list separated by commas, as lmms-eval takes them; a suite stands for its tasks.

    Raises:
        ConfigError: there is none.
    """
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    if not names:
        raise ConfigError("--tasks", repr(tasks), "names of tasks, separated by commas", "name one: --tasks mme")
    return list(dict.fromkeys(task for name in names for task in SUITES.get(name, (name,))))


def evaluate_tasks(
    folder: Path,
    tasks: str,
    *,
    limit: int | None = None,
    batch_size: int = 1,
    device: torch.device,
    dtype: torch.dtype | Precision = "auto",
    output: Path | None = None,
    style: Style | None = None,
    likelihood: bool = False,
    reference: Answers | None = None,
) -> dict[str, Any]:
    """Answer the questions of tasks and score the answers.

    Args:
        folder: packed checkpoint or full-precision folder of a vision-language model.
        tasks: their names, separated by commas.
        limit: answer only so many questions of each, the first ones.
        batch_size: questions per forward.
        device: to compute on.
        dtype: of what is not quantized; `auto` as in `unquantized_dtype`.
        output: a JSON file beside which the answers are written, and files that tasks write themselves (submissions).
        style: how the model is addressed; what it was trained with by default.
        likelihood: measure how likely the right answers are, too; in one process.
        reference: what another model answered, to compare with.

    Returns:
        In the first of several processes, which divide the questions (nothing in the others):
        `tasks`: for each by name, `accuracy` and `by_type` where it is measured by exact match (from 0 to 1),
        `questions` (how many were answered), `metrics` (all of lmms-eval's), and what `answers.compared` finds;
        `answers`, one by one; `seconds` for everything.

    Raises:
        ConfigError: lmms-eval is not installed, no such task, a limit below 1, a reference that was asked others.
        CheckpointError: the folder is not a vision-language model.
    """
    names = task_names(tasks)
    if limit is not None and limit < 1:
        raise ConfigError("--limit", str(limit), "an integer >= 1", "leave it out for all questions")
    require_lmms_eval()
    from lmms_eval.evaluator import simple_evaluate

    from eqat_eval.lmms_model import EqatVLM

    manager, style = _task_manager(names), style or Style()
    options: dict[str, Any] = {"dtype": dtype, "batch_size": batch_size, **vars(style)}
    started = time.perf_counter()
    model = EqatVLM(str(folder), device=str(device), **options)
    network = model.model if likelihood else None  # lmms-eval lets go of it when the answers are there
    found = simple_evaluate(
        model=model,
        tasks=list(names),
        task_manager=manager,
        limit=limit,
        bootstrap_iters=0,
        log_samples=True,
        distributed_executor_backend="torchrun",  # it asks the process group that is there
        cli_args=argparse.Namespace(
            output_path=None if output is None else str(output.parent), process_with_media=False
        ),
    )
    if found is None:
        return {}
    answers = Answers(records_of(found["samples"], SCORE))
    if network is not None:
        model.model = network
        measure_likelihoods(model, answers, reference)
    if output is not None:
        answers.write(output)
    questions = found["n-samples"]
    rows = {
        name: task_row(row, questions.get(name)) | compared(name, answers, reference)
        for name, row in found["results"].items()
    }
    return {"tasks": rows, "answers": answers, "seconds": time.perf_counter() - started}


def task_row(metrics: Mapping[str, Any], questions: Mapping[str, int] | None) -> dict[str, Any]:
    """Return what is reported of one task.

    Args:
        metrics: as lmms-eval names them, `metric,filter`; one over no question is NaN, and left out.
        questions: its counts; None for a group of tasks.
    """
    values = {
        name.split(",")[0]: value
        for name, value in metrics.items()
        if "," in name and "_stderr" not in name and isinstance(value, int | float) and math.isfinite(value)
    }
    prefix = f"{SCORE}_"
    return {
        "accuracy": values.get(SCORE),
        "questions": None if questions is None else questions["effective"],
        "by_type": {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)},
        "metrics": values,
    }


def task_line(name: str, row: Mapping[str, Any]) -> str:
    """Return one line for the user about one row of `evaluate_tasks`."""
    if row["accuracy"] is None:
        said = ", ".join(f"{metric} {value:.4g}" for metric, value in row["metrics"].items())
    else:
        types = ", ".join(f"{kind} {value:.1%}" for kind, value in row["by_type"].items())
        said = f"accuracy {row['accuracy']:.1%}" + (f" ({types})" if types else "")
    said += "".join(f", {what} {row[what]:{form}}" for what, form in _COMPARED.items() if what in row)
    return f"{name}: {said}" + ("" if row["questions"] is None else f" on {row['questions']:,} questions")


def tasks_folders() -> list[str]:
    """Return the folders of tasks that installed packages bring: what lmms-eval wants after --include_path."""
    return [str(folder) for folder in plugged_folders("tasks")]


def require_lmms_eval() -> None:
    """Check that lmms-eval is installed.

    Raises:
        ConfigError: it is not.
    """
    if importlib.util.find_spec("lmms_eval") is None:
        raise ConfigError(
            "--tasks",
            "lmms-eval is not installed",
            "an environment with lmms-eval",
            "install it: pip install 'eqat-mm[lmms-eval,vlm]'",
        )


def _task_manager(names: Sequence[str]) -> Any:
    """Return lmms-eval's index of tasks: ours alone where they are enough, because indexing its own takes long."""
    from lmms_eval.tasks import TaskManager

    manager = TaskManager(include_path=tasks_folders(), include_defaults=False, model_name="eqat")
    if all(name in manager.all_tasks for name in names):
        return manager
    manager = TaskManager(include_path=tasks_folders(), model_name="eqat")
    for name in names:
        if name not in manager.all_tasks:
            close = difflib.get_close_matches(name, manager.all_tasks, n=5) or ["mme", "scienceqa_img", "textvqa_val"]
            raise ConfigError(
                "--tasks",
                repr(name),
                f"a task of lmms-eval or of an installed package; similar: {', '.join(close)}",
                "choose one; `lmms-eval --tasks list` lists all",
            )
    return manager
