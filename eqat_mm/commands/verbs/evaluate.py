"""`eqat eval`: what a model predicts."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eqat_eval.multiple_choice import read_items
from eqat_eval.perplexity import PerplexityResult, ReferenceOutputs, evaluate_perplexity
from eqat_mm.blocks.source import WeightSource
from eqat_mm.checkpoint.adapters import adapter_bits
from eqat_mm.checkpoint.folders import is_packed, load_tokenizer
from eqat_mm.checkpoint.layout import SCALE_SUFFIX
from eqat_mm.commands.plumbing.answers import Answers
from eqat_mm.commands.plumbing.lmms import evaluate_tasks, task_line
from eqat_mm.commands.plumbing.models import load_model, model_folder, require_weights
from eqat_mm.commands.plumbing.runs import model_fingerprint
from eqat_mm.commands.plumbing.task_files import Asking, evaluate_task_file, task_file_line
from eqat_mm.data.image_text.style import AUTO, ImageShape, Style, require_template
from eqat_mm.data.text.settings import TextWindows
from eqat_mm.data.text.windows import digest_of, text_windows
from eqat_mm.errors import ConfigError
from eqat_mm.runtime.device import best_device
from eqat_mm.runtime.files import write_json
from eqat_mm.runtime.precision import Decided, Precision, arithmetic, autocast
from eqat_mm.runtime.progress import duration, say
from eqat_mm.runtime.ranks import ALONE, Ranks, launched_ranks, own_device
from eqat_mm.runtime.settings import Count, Settings

_STORED = ("weight", "weight_packed", "weight_scale", "weight_zero_point", "weight_shape")
"""What a checkpoint holds of a quantized linear, bias apart."""

HEADINGS = f"{'bits/weight':>12}{'perplexity':>14}{'KL':>9}{'top-1':>8}{'time':>9}"


@dataclass(frozen=True)
class EvalJob(Settings):
    """Perplexity on held-out text, with KL and top-1 agreement against a reference; or the score on tasks of lmms-eval.

    Attributes:
        model: packed checkpoint, model folder, alias or hub repository.
        reference: full-precision model to compare the predictions with; with `tasks` it answers the same questions, or
            is the .json file that `output` kept of it with `likelihood`.
        data: held-out text.
        tasks: tasks of lmms-eval, separated by commas, instead of held-out text: easy_vqa, mme, scienceqa_img, ...;
            llava-1.5 stands for those of its paper.
        task_file: questions with several answers to choose from, instead of held-out text: a file in the format of
            the public ones of PIQA, ARC and WinoGrande.
        likelihood: of tasks: also how likely the right answers are, and with a reference how far from its predictions.
        limit: questions of each task, or of the file, to answer, the first ones; all by default.
        template: of the prompts of tasks: `auto` (the one that the model was trained with), `vicuna_v1`, `model` (the
            one in its folder), or the path of a .jinja file.
        images: of tasks, those that are no squares: `pad`, `crop`, `model` (what its folder says), or `auto` (what the
            model was trained with).
        batch_size: windows, or questions of tasks, per forward.
        dtype: of what is not quantized, and of matrix products; `auto` takes bfloat16 on a GPU, float32 on a CPU.
        precision: of matrix products alone; float32 is float32 throughout, `auto` takes bfloat16 where it is faster.
        device: what to compute on: cpu, cuda, cuda:N, or auto.
        output: JSON file for the result; the answers to tasks are listed beside it.
    """

    model: str
    reference: str | None = None
    data: TextWindows = field(default_factory=lambda: TextWindows(part="held_out", length=512, count=64))
    tasks: str | None = None
    task_file: Path | None = None
    likelihood: bool = False
    limit: Count | None = None
    template: str = AUTO
    images: ImageShape = AUTO
    batch_size: Count = 4
    dtype: Precision = "auto"
    precision: Precision | None = None
    device: str = "auto"
    output: Path | None = None

    def check_together(self) -> None:
        """Check that the template is there, before anything is read."""
        require_template(self.template, "--template")


def evaluate(job: EvalJob) -> dict[str, Any]:
    """Evaluate a model, alone or as one of a launcher's processes; print, save and return the result.

    Raises:
        EqatError: any bad input.
    """
    _check_choice(job)
    folder = model_folder(job.model)
    require_weights(folder)
    device = best_device(own_device(job.device))
    with launched_ranks(device) as ranks:
        result: dict[str, Any] = {"model": job.model, "fingerprint": model_fingerprint(folder)}
        result["bits_per_weight"] = bits_per_weight(folder)
        result |= ranks.gathered(_measure(job, folder, device, ranks))[0]  # what lmms-eval found, the first has
        if job.output is not None and ranks.rank == 0:
            write_json(job.output, result)
        say(_line(result))
    return result


def _measure(job: EvalJob, folder: Path, device: torch.device, ranks: Ranks) -> dict[str, Any]:
    if job.task_file is not None:
        return _task_file(job, job.task_file, folder, device, ranks)
    if job.tasks is None:
        return _perplexity(job, folder, device, ranks)
    if job.likelihood and ranks.world > 1:
        one = "one process"
        raise ConfigError("--likelihood", f"{ranks.world} processes", one, "evaluate likelihoods in a run of their own")
    return _tasks_beside(job, folder, device)


def _task_file(job: EvalJob, path: Path, folder: Path, device: torch.device, ranks: Ranks) -> dict[str, Any]:
    products, dtype = arithmetic(job.precision, job.dtype, device)
    reference = None if job.reference is None else model_folder(job.reference)
    with _products(products, dtype, device):
        found = evaluate_task_file(folder, reference, path, job.limit, Asking(job.batch_size, device, dtype, ranks))
    return found | {"precision": products}


def _tasks_beside(job: EvalJob, folder: Path, device: torch.device) -> dict[str, Any]:
    """Ask the reference, where there is one, and then the model."""
    beside: dict[str, Any] = {}
    reference = None
    if job.reference is not None and _is_result(job.reference):
        reference = Answers.read(Path(job.reference))
    elif job.reference is not None:
        output = None if job.output is None else job.output.with_name(f"{job.output.stem}.reference.json")
        found = _tasks(job, model_folder(job.reference), device, output)
        reference = found.pop("answers", None)
        beside = {"reference": {"model": job.reference, **found}}
    result = _tasks(job, folder, device, job.output, reference)
    result.pop("answers", None)
    return result | beside


def _tasks(
    job: EvalJob, folder: Path, device: torch.device, output: Path | None, reference: Answers | None = None
) -> dict[str, Any]:
    products, dtype = arithmetic(job.precision, job.dtype, device)
    asked: dict[str, Any] = {"limit": job.limit, "batch_size": job.batch_size, "output": output}
    asked |= {"style": Style(job.template, job.images), "likelihood": job.likelihood, "reference": reference}
    with _products(products, dtype, device):
        return evaluate_tasks(folder, str(job.tasks), device=device, dtype=dtype, **asked) | {"precision": products}


def _is_result(reference: str) -> bool:
    return reference.endswith(".json") and not Path(reference).is_dir()


def _products(precision: Decided, dtype: torch.dtype, device: torch.device) -> AbstractContextManager[object]:
    """Return the context in which products of a model with parts in `dtype` have this precision."""
    return autocast(precision if dtype is torch.float32 else "float32", device)


def _check_choice(job: EvalJob) -> None:
    """Refuse options of the measurement that was not chosen, and held-out text without a name."""
    if job.tasks is not None and job.task_file is not None:
        raise ConfigError("--task_file", "--tasks, too", "one of them", "evaluate them in two runs")
    if job.tasks is None and job.task_file is None and job.limit is not None:
        raise ConfigError("--limit", "no --tasks", "a limit for tasks", "for held-out text, set --data.count")
    if job.tasks is None and job.likelihood:
        raise ConfigError("--likelihood", "no --tasks", "with questions of tasks", "leave it out, or name --tasks")
    for name in ("template", "images"):
        if job.tasks is None and getattr(job, name) != AUTO:
            raise ConfigError(f"--{name}", "no --tasks", "with questions about images", "leave it out, or name --tasks")
    if job.tasks is not None and job.reference is not None and not _is_result(job.reference):
        require_weights(model_folder(job.reference))
    if job.task_file is not None:
        read_items(job.task_file, job.limit)
        if job.reference is not None:
            require_weights(model_folder(job.reference))
    elif job.tasks is None:
        job.data.require_source("--data.source")


def _perplexity(job: EvalJob, folder: Path, device: torch.device, ranks: Ranks) -> dict[str, Any]:
    reference = None if job.reference is None else model_folder(job.reference)
    if reference is not None:
        require_weights(reference)
    windows = text_windows(load_tokenizer(folder), job.data)
    if len(windows) < ranks.world:
        raise ConfigError(
            where="--data.count",
            given=f"{len(windows)} windows for {ranks.world} processes",
            allowed="a window or more for each process",
            do="evaluate more windows, or in fewer processes",
        )
    bench = Bench(reference, windows, job.batch_size, job.precision, device, job.dtype, ranks)
    return bench.measure(folder).as_dict() | {"precision": bench.precision, "text": bench.decides["tokens"]}


class Bench:
    """Measures models on the same tokens against the same full-precision outputs.

    Args:
        full_precision: folder of the model to compare with; None for no comparison.
        windows: token ids, int64 [n, T].
        batch_size: windows per forward.
        precision: of matrix products.
        device: to compute on.
        dtype: of what is not quantized, in all models, the full-precision one among them.
        ranks: processes that divide the windows.
    """

    def __init__(
        self,
        full_precision: Path | None,
        windows: Tensor,
        batch_size: int,
        precision: Precision | None,
        device: torch.device,
        dtype: Precision = "auto",
        ranks: Ranks = ALONE,
    ) -> None:
        self.ranks, self.own = ranks, windows[list(ranks.share(len(windows)))]
        self.full_precision, self.windows, self.batch_size = full_precision, windows, batch_size
        self.precision, self.dtype = arithmetic(precision, dtype, device)
        self.device = device
        self.reference: ReferenceOutputs | None = None

    @property
    def decides(self) -> dict[str, Any]:
        """What decides its figures beside the model, JSON-ready."""
        full = None if self.full_precision is None else str(self.full_precision)
        measure = {"precision": self.precision, "dtype": str(self.dtype), "reference": full}
        return measure | {"tokens": digest_of(self.windows)}

    def measure(self, folder: Path) -> PerplexityResult:
        """Evaluate the model in `folder`."""
        full = self.full_precision if self.reference is None else None
        with _products(self.precision, self.dtype, self.device):
            model = load_model(full or folder, self.device, self.dtype)
            if full is not None:
                self.reference = ReferenceOutputs.record(model, self.own, self.batch_size)
                if folder != full:
                    del model  # one at a time
                    model = load_model(folder, self.device, self.dtype)
            given: dict[str, Any] = {"reference": self.reference, "ranks": self.ranks}
            return evaluate_perplexity(model, self.own, batch_size=self.batch_size, **given)

    def row(self, folder: Path) -> dict[str, Any]:
        """Return what a table says of the model in `folder`."""
        found = self.measure(folder)
        return {
            "perplexity": found.perplexity,
            "kl": found.kl,
            "top1_agreement": found.top1_agreement,
            "bits_per_weight": bits_per_weight(folder),
        }

    def results(self, rows: list[dict[str, Any]], made_by: dict[str, Any]) -> dict[str, Any]:
        """Return what `results.json` says of rows that were measured here, with their provenance."""
        return {
            "tokens": self.windows[:, 1:].numel(),
            "precision": self.precision,
            "rows": rows,
            "provenance": made_by,
            "threads": torch.get_num_threads(),
        }


def numbers(row: dict[str, Any]) -> str:
    """Return the numbers of a row as text, to stand below `HEADINGS`."""
    bits = "" if row["bits_per_weight"] is None else f"{row['bits_per_weight']:.2f}"
    compared = f"{row['perplexity']:>14,.2f}{row['kl']:>9.4f}{row['top1_agreement']:>8.1%}"
    return f"{bits:>12}{compared}{duration(row['seconds']):>9}"


def bits_per_weight(folder: Path) -> float | None:
    """Stored bits per quantized weight with step sizes, zero points and adapters; None for full precision."""
    if not is_packed(folder):
        return None
    source = WeightSource(folder)
    stored = weights = 0
    for module in (name.removesuffix(SCALE_SUFFIX) for name in source.names() if name.endswith(SCALE_SUFFIX)):
        tensors = {leaf: source.read(f"{module}.{leaf}") for leaf in _STORED if f"{module}.{leaf}" in source}
        shape = tensors.pop("weight_shape", None)
        stored += sum(tensor.nbytes for tensor in tensors.values()) * 8
        weights += tensors["weight"].numel() if shape is None else int(shape.prod())
    return (stored + adapter_bits(folder)) / weights


def _line(result: dict[str, Any]) -> str:
    if "task_file" in result:
        return f"{result['model']}: {task_file_line(result)}"
    if "tasks" in result:
        rows = ", ".join(task_line(name, row) for name, row in result["tasks"].items())
        beside = f"\n{_line(result['reference'])}" if "reference" in result else ""
        return f"{result['model']}: {rows} ({duration(result['seconds'])}){beside}"
    text = f"perplexity {result['perplexity']:.3f} on {result['tokens']:,} tokens"
    if result["kl"] is not None:
        text += f", KL {result['kl']:.4f}, top-1 agreement {result['top1_agreement']:.1%}"
    return f"{result['model']}: {text} ({duration(result['seconds'])})"
