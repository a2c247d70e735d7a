"""`eqat llm-qat-table`: rounding, SmoothQuant and LLM-QAT of one model at several settings W-A-KV, in one table.

Each row is a run of `eqat llm-qat` in a folder of its own with its result beside it, so an interrupted table continues
where it stopped. All rows are measured on the same held-out tokens against the same full-precision outputs.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eqat_eval.perplexity import PerplexityResult, ReferenceOutputs, evaluate_perplexity
from eqat_mm.commands.evaluate import bits_per_weight
from eqat_mm.commands.llm_qat import LLMQATJob, llm_qat
from eqat_mm.commands.models import best_device, load_model, load_tokenizer, model_folder, require_weights
from eqat_mm.commands.runs import discard, require_single_process, settings
from eqat_mm.data.windows import TextWindows, digest_of, text_windows
from eqat_mm.quant.bit_widths import BitWidths
from eqat_mm.runtime.files import read_json, write_json
from eqat_mm.runtime.precision import Precision, autocast, resolve
from eqat_mm.runtime.progress import duration, say
from eqat_mm.runtime.provenance import provenance

SETTINGS = ("4-8-4", "4-8-8", "8-8-4", "8-8-8", "4-8-16", "4-4-16")
QUICK_SETTINGS = ("4-8-4", "8-8-8")
QUICK_STEPS = 8
QUICK_WINDOWS = 4


@dataclass(frozen=True)
class LLMQATTableJob:
    """The table of LLM-QAT of one model.

    Attributes:
        train: LLM-QAT; its model and text are those of the whole table. Bits, loss and smoothing are those of a row.
        bits: settings W-A-KV, one group of rows each.
        generated: text that the model wrote itself, a file or a folder; null leaves out the rows trained on it.
        smooth: strength of SmoothQuant in the row that has it.
        data: held-out text that every row is measured on.
        batch_size: windows per forward of the evaluation.
        precision: of the matrix products of the evaluation.
        output: folder of all runs and of results.json.
        quick: two settings, a few steps and windows: whether everything works, not how well.
        fresh: discard finished rows in the output folder.
    """

    train: LLMQATJob = field(default_factory=LLMQATJob)
    bits: tuple[str, ...] = SETTINGS
    generated: Path | None = None
    smooth: float = 0.5
    data: TextWindows = field(default_factory=lambda: TextWindows(part="held_out", length=512, count=64))
    batch_size: int = 4
    precision: Precision = "float32"
    output: Path | None = None
    quick: bool = False
    fresh: bool = False


def llm_qat_table(job: LLMQATTableJob) -> list[dict[str, Any]]:
    """Make the table; print it, write `results.json`, and return its rows.

    Raises:
        EqatError: any bad input.
    """
    require_single_process("llm-qat-table")
    job = _quick(job) if job.quick else job
    runs = [(bits, method, run) for bits in job.bits for method, run in _methods(job, BitWidths.parse(bits))]
    bench = _Bench(job)
    bench.measure("16-16-16", "full precision", None)
    for bits, method, run in runs:
        bench.measure(bits, method, run)
    return bench.rows


def _quick(job: LLMQATTableJob) -> LLMQATTableJob:
    steps = min(QUICK_STEPS, job.train.max_steps or QUICK_STEPS)
    return replace(
        job,
        bits=tuple(bits for bits in QUICK_SETTINGS if bits in job.bits) or job.bits[:1],
        train=replace(job.train, max_steps=steps, save_steps=0),
        data=replace(job.data, count=min(QUICK_WINDOWS, job.data.count or QUICK_WINDOWS)),
    )


def _methods(job: LLMQATTableJob, widths: BitWidths) -> Iterator[tuple[str, LLMQATJob]]:
    """Yield the rows of one setting: what each is called, and its run."""
    folder = _root(job) / widths.name
    train = replace(job.train, bits=widths.name, loss="logits", smooth=None)
    rounded = replace(train, max_steps=0)
    yield "round-to-nearest", replace(rounded, output=folder / "rtn")
    yield "SmoothQuant", replace(rounded, output=folder / "smooth", smooth=job.smooth)
    if job.generated is not None:
        text = replace(train.data, source=str(job.generated), part="all")
        yield "LLM-QAT, generated text", replace(train, output=folder / "generated", data=text)
    yield "LLM-QAT, real text", replace(train, output=folder / "real")
    yield "labels for logits, real text", replace(train, output=folder / "labels", loss="labels")


def _root(job: LLMQATTableJob) -> Path:
    return job.output or Path("runs") / f"{Path(job.train.model).name}-llm-qat-table"


class _Bench:
    """Measures each row on the same tokens against the same full-precision outputs, unless it was measured before."""

    def __init__(self, job: LLMQATTableJob) -> None:
        self.job, self.root = job, _root(job)
        self.full = model_folder(job.train.model)
        require_weights(self.full)
        self.device = best_device(job.train.device)
        self.precision = resolve(job.precision, self.device)
        self.windows: Tensor = text_windows(load_tokenizer(self.full), job.data)
        self.reference: ReferenceOutputs | None = None
        self.rows: list[dict[str, Any]] = []

    def measure(self, bits: str, method: str, run: LLMQATJob | None) -> None:
        """Make and evaluate the model of a row, print and save the table so far."""
        say(f"== {bits} {method}")
        folder = self.root / "full-precision" if run is None or run.output is None else run.output
        if self.job.fresh:
            discard(folder)
        decides = {
            "run": None if run is None else settings(run),
            "evaluation": {"tokens": digest_of(self.windows), "precision": self.precision},
        }
        noted = folder / "row.json"
        if not noted.is_file() or read_json(noted)["decides"] != decides:
            row = {"bits": bits, "method": method} | self._made(run)
            write_json(noted, {"decides": decides, "row": row})
        self.rows.append(read_json(noted)["row"])
        self._save()
        say(table(self.rows))

    def _made(self, run: LLMQATJob | None) -> dict[str, Any]:
        start = time.monotonic()
        model = self.full if run is None else llm_qat(run)
        seconds = time.monotonic() - start
        found = self._evaluate(model)
        return {
            "perplexity": found.perplexity,
            "kl": found.kl,
            "top1_agreement": found.top1_agreement,
            "bits_per_weight": bits_per_weight(model),
            "seconds": 0.0 if run is None else round(seconds, 1),
        }

    def _evaluate(self, folder: Path) -> PerplexityResult:
        size = self.job.batch_size
        with autocast(self.precision, self.device):
            if self.reference is None:
                full = load_model(self.full, self.device)
                self.reference = ReferenceOutputs.record(full, self.windows, size)
            model = load_model(folder, self.device)
            return evaluate_perplexity(model, self.windows, batch_size=size, reference=self.reference)

    def _save(self) -> None:
        record = {
            "model": self.job.train.model,
            "tokens": len(self.windows) * (self.windows.shape[1] - 1),
            "precision": self.precision,
            "rows": self.rows,
            "provenance": provenance("llm-qat-table", settings(self.job), self.job.train.seed),
            "threads": torch.get_num_threads(),
        }
        write_json(self.root / "results.json", record)


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as text, one line each below a heading."""
    lines = [f"{'W-A-KV':<10}{'method':<30}{'bits/weight':>12}{'perplexity':>14}{'KL':>9}{'top-1':>8}{'time':>9}"]
    for row in rows:
        bits = "" if row["bits_per_weight"] is None else f"{row['bits_per_weight']:.2f}"
        lines.append(
            f"{row['bits']:<10}{row['method']:<30}{bits:>12}{row['perplexity']:>14,.2f}{row['kl']:>9.4f}"
            f"{row['top1_agreement']:>8.1%}{duration(row['seconds']):>9}"
        )
    return "\n".join(lines)
