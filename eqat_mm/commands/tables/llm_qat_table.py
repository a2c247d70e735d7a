"""`eqat llm-qat-table`: rounding, SmoothQuant and LLM-QAT of one model at several settings W-A-KV, in one table.

Each row is a run of `eqat llm-qat` in a folder of its own, and its result one in `eval`, so an interrupted table
continues where it stopped. All rows are measured on the same held-out tokens against the same full-precision outputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

from eqat_mm.checkpoint.folders import load_tokenizer
from eqat_mm.commands.plumbing.models import model_folder, require_weights
from eqat_mm.commands.plumbing.runs import (
    model_fingerprint,
    require_single_process,
    seconds_of,
    settings,
    what_decides,
)
from eqat_mm.commands.tables.table import Row, Table
from eqat_mm.commands.verbs.evaluate import HEADINGS, Bench, numbers
from eqat_mm.commands.verbs.llm_qat import LLMQATJob, llm_qat
from eqat_mm.data.text.settings import TextWindows
from eqat_mm.data.text.windows import digest_of, text_windows
from eqat_mm.errors import ConfigError
from eqat_mm.quant.bit_widths import BitWidths
from eqat_mm.runtime.device import best_device
from eqat_mm.runtime.precision import Precision
from eqat_mm.runtime.progress import say
from eqat_mm.runtime.provenance import provenance
from eqat_mm.runtime.settings import Count, Filled, Fraction, Settings

SETTINGS = ("4-8-4", "4-8-8", "8-8-4", "8-8-8", "4-8-16", "4-4-16")
QUICK_SETTINGS = ("4-8-4", "8-8-8")
QUICK_STEPS = 8
QUICK_WINDOWS = 4


@dataclass(frozen=True)
class LLMQATTableJob(Settings):
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
        overwrite: discard finished rows in the output folder.
    """

    train: LLMQATJob = field(default_factory=lambda: LLMQATJob(model="smollm2-135m"))
    bits: Annotated[tuple[str, ...], Filled()] = SETTINGS
    generated: Path | None = None
    smooth: Fraction = 0.5
    data: TextWindows = field(default_factory=lambda: TextWindows(part="held_out", length=512, count=64))
    batch_size: Count = 4
    precision: Precision = "float32"
    output: Path | None = None
    quick: bool = False
    overwrite: bool = False

    def check_together(self) -> None:
        """Check every setting W-A-KV, and that text is trained on."""
        for bits in self.bits:
            BitWidths.parse(bits)
        if self.train.conversations is not None:
            raise ConfigError(
                where="--train.conversations.source",
                given=self.train.conversations.source,
                allowed="text, with --train.data.source: the rows are compared on held-out text",
                do="leave it out; `eqat llm-qat` trains on conversations",
            )


def llm_qat_table(job: LLMQATTableJob) -> list[dict[str, Any]]:
    """Make the table; print it, write `results.json`, and return its rows.

    Raises:
        EqatError: any bad input.
    """
    require_single_process("llm-qat-table")
    job = _quick(job) if job.quick else job
    runs = [(bits, method, run) for bits in job.bits for method, run in _methods(job, BitWidths.parse(bits))]
    rows = _Rows(job)
    rows.add("16-16-16", "full precision", None)
    for bits, method, run in runs:
        rows.add(bits, method, run)
    return rows.table.rows


def _quick(job: LLMQATTableJob) -> LLMQATTableJob:
    steps = min(QUICK_STEPS, job.train.max_steps or QUICK_STEPS)
    return replace(
        job,
        bits=tuple(bits for bits in QUICK_SETTINGS if bits in job.bits) or job.bits[:1],
        train=replace(job.train, max_steps=steps, save_steps=0, warmup_steps=min(steps, job.train.warmup_steps)),
        data=replace(job.data, count=min(QUICK_WINDOWS, job.data.count or QUICK_WINDOWS)),
    )


def _methods(job: LLMQATTableJob, widths: BitWidths) -> Iterator[tuple[str, LLMQATJob]]:
    """Yield the rows of one setting: what each is called, and its run."""
    folder = _root(job) / widths.name
    train = replace(job.train, bits=widths.name, loss="kl", smooth=None, text_only=True)
    rounded = replace(train, max_steps=0)
    yield "round-to-nearest", replace(rounded, output=folder / "rtn")
    yield "SmoothQuant", replace(rounded, output=folder / "smooth", smooth=job.smooth)
    if job.generated is not None:
        text = replace(train.data, source=str(job.generated), part="all")
        yield "LLM-QAT, generated text", replace(train, output=folder / "generated", data=text)
    yield "LLM-QAT, real text", replace(train, output=folder / "real")
    yield "cross entropy for KL, real text", replace(train, output=folder / "labels", loss="cross-entropy")


def _root(job: LLMQATTableJob) -> Path:
    return job.output or Path("runs") / f"{Path(job.train.model).name}-llm-qat-table"


class _Rows:
    """Makes and measures each row, unless it was measured before."""

    def __init__(self, job: LLMQATTableJob) -> None:
        self.job = job
        self.full = model_folder(job.train.model)
        require_weights(self.full)
        device = best_device(job.train.device)
        windows = text_windows(load_tokenizer(self.full), job.data)
        self.bench = Bench(self.full, windows, job.batch_size, job.precision, device)
        self.table = Table(_root(job), "llm-qat-table", self._results, table, anew=job.overwrite)
        self.digests: dict[TextWindows, str] = {}

    def add(self, bits: str, method: str, run: LLMQATJob | None) -> None:
        """Make and evaluate the model of a row, print and save the table so far."""
        say(f"== {bits} {method}")
        labels = {"bits": bits, "method": method}
        self.table.add(f"{bits} {method}", self._decides(run), lambda: self._made(run), lambda row: labels | row)

    def _results(self, rows: list[Row]) -> Row:
        made_by = provenance("llm-qat-table", settings(self.job), self.job.train.seed)
        return {"model": self.job.train.model} | self.bench.results(rows, made_by)

    def _decides(self, run: LLMQATJob | None) -> dict[str, Any]:
        decides = self.bench.decides | {"model": model_fingerprint(self.full)}
        if run is None:
            return decides
        return decides | {"run": what_decides(run), "text": self._digest(run.data) if run.reads_data else None}

    def _digest(self, data: TextWindows) -> str:
        if data not in self.digests:
            self.digests[data] = digest_of(text_windows(load_tokenizer(self.full), data))
        return self.digests[data]

    def _made(self, run: LLMQATJob | None) -> dict[str, Any]:
        model = self.full if run is None else llm_qat(replace(run, overwrite=self.job.overwrite))
        return self.bench.row(model) | {"seconds": round(seconds_of(model), 1)}


def table(rows: list[Row]) -> str:
    """Return the rows as text, one line each below a heading."""
    lines = [f"{row['bits']:<10}{row['method']:<30}{numbers(row)}" for row in rows]
    return "\n".join([f"{'W-A-KV':<10}{'method':<30}{HEADINGS}", *lines])
