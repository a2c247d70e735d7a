"""`eqat demo`: the ladder of stages on one model and spec.

Full precision; round-to-nearest; E2E-QP on round-to-nearest; Block-AP; Block-AP + E2E-QP. Each rung is a job of its
own with a folder of its own, so an interrupted ladder continues where it stopped, and every checkpoint can be used.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eqat_eval.perplexity import PerplexityResult, ReferenceOutputs, evaluate_perplexity
from eqat_mm.commands.evaluate import bits_per_weight
from eqat_mm.commands.models import best_device, load_model, load_tokenizer, model_folder, require_model
from eqat_mm.commands.quantize import BlockAPJob, RTNJob, block_ap, rtn
from eqat_mm.commands.runs import default_output, seconds_of, settings
from eqat_mm.commands.tune import E2EQPJob, e2e_qp
from eqat_mm.data.windows import TextWindows, text_windows
from eqat_mm.runtime.files import write_json
from eqat_mm.runtime.precision import Precision, autocast, resolve
from eqat_mm.runtime.progress import duration, say
from eqat_mm.runtime.provenance import provenance


@dataclass(frozen=True)
class LadderJob:
    """The ladder of stages of one model.

    Attributes:
        block_ap: Block-AP; its model and spec are those of the whole ladder.
        e2e_qp: E2E-QP after Block-AP.
        e2e_qp_only: E2E-QP on round-to-nearest, which needs larger steps; null leaves this rung out.
        data: held-out text that every rung is measured on.
        batch_size: windows per forward of the evaluation.
        precision: of the matrix products of the evaluation.
        output: folder of all runs and of results.json.
        fresh: discard finished rungs in the output folder.
    """

    block_ap: BlockAPJob = field(default_factory=BlockAPJob)
    e2e_qp: E2EQPJob = field(default_factory=E2EQPJob)
    e2e_qp_only: E2EQPJob | None = field(default_factory=E2EQPJob)
    data: TextWindows = field(default_factory=lambda: TextWindows(part="held_out", length=512, count=64))
    batch_size: int = 4
    precision: Precision = "auto"
    output: Path | None = None
    fresh: bool = False


def ladder(job: LadderJob) -> list[dict[str, Any]]:
    """Climb the ladder; print the table, write `results.json`, and return its rows.

    Raises:
        EqatError: any bad input.
    """
    model, spec = job.block_ap.model, job.block_ap.quant
    root = job.output or default_output(model, spec)
    bench = _Bench(model, job, root)
    overwrite = job.fresh
    bench.measure("full precision", lambda: model_folder(model))
    rounded = bench.measure(
        "round-to-nearest",
        lambda: rtn(RTNJob(model=model, output=root / "rtn", quant=spec, overwrite=overwrite)),
    )
    both = replace(job.e2e_qp, model=model, output=root / "e2e-qp", overwrite=overwrite)
    if job.e2e_qp_only is not None:
        alone = replace(
            job.e2e_qp_only, model=model, quantized=rounded, output=root / "e2e-qp-only", overwrite=overwrite
        )
        bench.measure("E2E-QP only", lambda: e2e_qp(alone))
    fit = replace(job.block_ap, output=root / "block-ap", overwrite=overwrite)
    fitted = bench.measure("Block-AP", lambda: block_ap(fit))
    bench.measure("Block-AP + E2E-QP", lambda: e2e_qp(replace(both, quantized=fitted)))
    return bench.rows


class _Bench:
    """Measures each rung on the same tokens against the same full-precision outputs."""

    def __init__(self, model: str, job: LadderJob, root: Path) -> None:
        self.model, self.job, self.root = model, job, root
        folder = model_folder(model)
        require_model(folder)
        self.device = best_device(job.block_ap.device)
        self.precision = resolve(job.precision, self.device)
        self.windows: Tensor = text_windows(load_tokenizer(folder), job.data)
        self.reference: ReferenceOutputs | None = None
        self.rows: list[dict[str, Any]] = []

    def measure(self, stage: str, make: Any) -> Path:
        """Make the checkpoint of a rung, evaluate it, print and save the table so far; return its folder."""
        say(f"== {stage}")
        start = time.monotonic()
        folder: Path = make()
        seconds = seconds_of(folder, time.monotonic() - start)
        found = self._evaluate(folder)
        row = {
            "stage": stage,
            "perplexity": found.perplexity,
            "kl": found.kl,
            "top1_agreement": found.top1_agreement,
            "bits_per_weight": bits_per_weight(folder),
            "seconds": round(seconds, 1),
        }
        self.rows.append(row)
        self._save(found.tokens)
        say(_table(self.rows))
        return folder

    def _evaluate(self, folder: Path) -> PerplexityResult:
        model = load_model(folder, self.device)
        size = self.job.batch_size
        with autocast(self.precision, self.device):
            if self.reference is None:
                self.reference = ReferenceOutputs.record(model, self.windows, size)
            return evaluate_perplexity(model, self.windows, batch_size=size, reference=self.reference)

    def _save(self, tokens: int) -> None:
        spec = self.job.block_ap.quant
        record = {
            "model": self.model,
            "bits": spec.bits,
            "group_size": spec.group_size,
            "tokens": tokens,
            "precision": self.precision,
            "rows": self.rows,
            "provenance": provenance("demo", settings(self.job), self.job.block_ap.seed),
            "threads": torch.get_num_threads(),
        }
        write_json(self.root / "results.json", record)


def _table(rows: list[dict[str, Any]]) -> str:
    lines = [f"{'stage':<20}{'bits/weight':>12}{'perplexity':>13}{'KL':>9}{'top-1':>8}{'time':>8}"]
    for row in rows:
        bits = "" if row["bits_per_weight"] is None else f"{row['bits_per_weight']:.2f}"
        lines.append(
            f"{row['stage']:<20}{bits:>12}{row['perplexity']:>13,.2f}{row['kl']:>9.4f}{row['top1_agreement']:>8.1%}"
            f"{duration(row['seconds']):>8}"
        )
    return "\n".join(lines)
