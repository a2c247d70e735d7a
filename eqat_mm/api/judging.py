"""`evaluate`: what a model predicts, from Python."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers import PreTrainedModel

from eqat_mm.api.asked import Text, job_from, require_no_processor, said, sources_of
from eqat_mm.api.in_memory import is_packed_model, packed_folder, require_full_precision, written
from eqat_mm.checkpoint.folders import is_packed
from eqat_mm.checkpoint.manifest import read_manifest
from eqat_mm.commands.line.model_config import config_of
from eqat_mm.commands.plumbing.models import model_folder
from eqat_mm.commands.verbs import evaluate as command
from eqat_mm.commands.verbs.evaluate import EvalJob
from eqat_mm.runtime.progress import say

_OF_TASKS = ("limit", "template", "images")
"""Settings that held-out text has no use for."""


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` found; None where it was not asked.

    Attributes:
        model: folder that was read.
        bits_per_weight: stored bits per quantized weight, step sizes, zero points and adapters included; None in full
            precision.
        perplexity: exp of the mean negative log-likelihood per token of the text.
        kl: mean KL(reference || model) in nats per token.
        top1_agreement: share of tokens, 0 to 1, of which model and reference predict the same as likeliest.
        tokens: predicted tokens of the text.
        tasks: by name of the task: `accuracy` (0 to 1; None where it is not measured by exact match), `by_type`,
            `questions` and `metrics`.
        reference_tasks: the same of the reference.
        choices: of `task_file`: `questions`, `accuracy`, `accuracy_norm`, `margin`, and beside a reference
            `reference_accuracy`, `flips` and `margin_change`.
        seconds: wall time.
    """

    model: str
    bits_per_weight: float | None
    perplexity: float | None = None
    kl: float | None = None
    top1_agreement: float | None = None
    tokens: int | None = None
    tasks: dict[str, dict[str, Any]] = field(default_factory=dict)
    reference_tasks: dict[str, dict[str, Any]] = field(default_factory=dict)
    choices: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0


def evaluate(
    model: str | Path | PreTrainedModel,
    *,
    text: Text | None = None,
    tasks: str | Sequence[str] | None = None,
    reference: str | Path | None = "auto",
    processor: Any = None,
    output: str | Path | None = None,
    device: str | None = None,
    quiet: bool = False,
    settings: Mapping[str, Any] | None = None,
    **more: Any,
) -> Evaluation:
    """Evaluate a model on held-out text, on tasks of lmms-eval, or on both: what `eqat eval` does.

    A model in memory is evaluated as it would be saved: it is written to a temporary folder, unless it is a packed one
    that was not changed since it was loaded.

    Args:
        model: as `quantize`, `tune` and `load` return it, a transformers model in full precision, a folder, the folder
            of a run, an alias or a hub repository.
        text: whose held-out side is predicted.
        tasks: of lmms-eval, by name.
        reference: full-precision model to compare with. `auto`: on text, the one that a packed model was made from;
            on tasks, which it would have to answer as well, none.
        processor: of a full-precision model in memory. Default: that of its `name_or_path`.
        output: JSON file for the result on text; that on tasks lies beside it, NAME.tasks.json.
        device: what to compute on: cpu, cuda, cuda:N, or auto.
        quiet: print nothing.
        settings: other settings by the names of the options, as for `quantize`: `{"data.count": 64}`.
        **more: the same.

    Raises:
        EqatError: any bad input; neither text nor tasks.
    """
    with said(unless=quiet), _readable(model, processor) as folder:
        beside = {**(settings or {}), **more}
        common: dict[str, Any] = {"model": folder, "device": device}
        found: dict[str, Any] = {}
        if text is not None or tasks is None:
            given = common | {"data.source": sources_of(text), "reference": _reference(folder, reference)}
            kept = beside if tasks is None else {k: v for k, v in beside.items() if k not in _OF_TASKS}
            found = command.evaluate(job_from("eval", EvalJob, given | {"output": output}, kept))
        if tasks is not None:
            given = common | {"tasks": tasks if isinstance(tasks, str) else ",".join(tasks)}
            given |= {"reference": None if reference == "auto" else reference, "output": _tasks_file(output)}
            found = _joined(found, command.evaluate(job_from("eval", EvalJob, given, beside)))
    names = ("perplexity", "kl", "top1_agreement", "tokens", "bits_per_weight", "seconds")
    known = {name: found[name] for name in names if name in found}
    asked = {"tasks": found.get("tasks", {}), "reference_tasks": found.get("reference", {}).get("tasks", {})}
    return Evaluation(str(found["model"]), **known, **asked, choices=found.get("task_file", {}))


def _joined(text: dict[str, Any], tasks: dict[str, Any]) -> dict[str, Any]:
    return text | tasks | {"seconds": text.get("seconds", 0.0) + tasks.get("seconds", 0.0)}


def _tasks_file(output: str | Path | None) -> Path | None:
    return None if output is None else Path(output).with_suffix(".tasks.json")


@contextmanager
def _readable(model: Any, processor: Any) -> Iterator[str]:
    """Yield what `eqat eval --model` takes for a model."""
    if isinstance(model, str | Path):
        require_no_processor(processor)
        yield str(model)
        return
    with TemporaryDirectory() as name:
        folder = Path(name) / "model"
        if is_packed_model(model):
            yield str(packed_folder(model, folder, overwrite=True))
        else:
            require_full_precision(model)
            yield str(written(model, folder, processor, overwrite=True))


def _reference(model: str, reference: str | Path | None) -> str | Path | None:
    """Return the model to compare predictions with; of a packed model the one that it was made from, if it is there."""
    if reference != "auto":
        return reference
    folder = model_folder(model)
    if not is_packed(folder):
        return None
    source = read_manifest(folder).source
    if config_of(source) is None:
        say(f"compared with nothing: {source}, which the model was made from, is not there; name it as the reference")
        return None
    return source
