"""`eqat demo`: the ladder of stages on one model and spec.

Full precision; round-to-nearest; E2E-QP on round-to-nearest; Block-AP; Block-AP + E2E-QP. Each rung is a job of its
own with a folder of its own, so an interrupted ladder continues where it stopped, and every checkpoint can be used.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from eqat_mm.checkpoint.folders import load_tokenizer
from eqat_mm.commands.plumbing.models import model_folder, require_weights
from eqat_mm.commands.plumbing.runs import default_output, require_single_process, settings
from eqat_mm.commands.tables.rungs import Rungs
from eqat_mm.commands.verbs.evaluate import Bench
from eqat_mm.commands.verbs.quantize import BlockAPJob, RTNJob, block_ap, rtn
from eqat_mm.commands.verbs.tune import E2EQPJob, e2e_qp
from eqat_mm.data.text.settings import TextWindows
from eqat_mm.data.text.windows import text_windows
from eqat_mm.runtime.device import best_device
from eqat_mm.runtime.precision import Precision
from eqat_mm.runtime.provenance import provenance
from eqat_mm.runtime.settings import Count, Settings

_MODEL = "smollm2-135m"


@dataclass(frozen=True)
class LadderJob(Settings):
    """The ladder of stages of one model.

    Attributes:
        block_ap: Block-AP; its model and spec are those of the whole ladder.
        e2e_qp: E2E-QP after Block-AP.
        e2e_qp_only: E2E-QP on round-to-nearest, which needs larger steps; null leaves this rung out.
        data: held-out text that every rung is measured on.
        beside: texts of another kind that it is measured on, too, by name: in the demo demo-wikipedia-es, demo-python.
        batch_size: windows per forward of the evaluation.
        precision: of the matrix products of the evaluation.
        output: folder of all runs and of results.json.
        overwrite: discard finished rungs in the output folder.
    """

    block_ap: BlockAPJob = field(default_factory=lambda: BlockAPJob(model=_MODEL))
    e2e_qp: E2EQPJob = field(default_factory=lambda: E2EQPJob(model=_MODEL))
    e2e_qp_only: E2EQPJob | None = field(default_factory=lambda: E2EQPJob(model=_MODEL))
    data: TextWindows = field(default_factory=lambda: TextWindows(part="held_out", length=512, count=64))
    beside: tuple[str, ...] = ()
    batch_size: Count = 4
    precision: Precision = "auto"
    output: Path | None = None
    overwrite: bool = False


def ladder(job: LadderJob) -> list[dict[str, Any]]:
    """Climb the ladder; print the table, write `results.json`, and return its rows.

    Raises:
        EqatError: any bad input.
    """
    require_single_process("demo")
    model, spec = job.block_ap.model, job.block_ap.quant
    rungs = _rungs(job)
    root, overwrite = rungs.root, job.overwrite
    rungs.add("full precision", lambda: model_folder(model))
    rounded = rungs.add(
        "round-to-nearest",
        lambda: rtn(RTNJob(model=model, output=root / "rtn", quant=spec, overwrite=overwrite)),
    )
    both = replace(job.e2e_qp, model=model, output=root / "e2e-qp", overwrite=overwrite)
    if job.e2e_qp_only is not None:
        alone = replace(
            job.e2e_qp_only, model=model, quantized=rounded, output=root / "e2e-qp-only", overwrite=overwrite
        )
        rungs.add("E2E-QP only", lambda: e2e_qp(alone))
    fit = replace(job.block_ap, output=root / "block-ap", overwrite=overwrite)
    fitted = rungs.add("Block-AP", lambda: block_ap(fit))
    rungs.add("Block-AP + E2E-QP", lambda: e2e_qp(replace(both, quantized=fitted)))
    return rungs.rows


def _rungs(job: LadderJob) -> Rungs:
    model, spec = job.block_ap.model, job.block_ap.quant
    folder = model_folder(model)
    require_weights(folder)
    texts = {name: replace(job.data, source=name, part="all") for name in job.beside}
    bench, *others = (
        Bench(
            folder,
            text_windows(load_tokenizer(folder), data),
            job.batch_size,
            job.precision,
            best_device(job.block_ap.device),
        )
        for data in (job.data, *texts.values())
    )
    made_by = provenance("demo", settings(job), job.block_ap.seed)
    root = job.output or default_output(model, spec)
    beside = dict(zip(texts, others, strict=True))
    return Rungs(bench, root, "demo", model, spec, made_by, anew=job.overwrite, beside=beside)
