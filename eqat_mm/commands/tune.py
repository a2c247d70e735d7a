"""`eqat e2e-qp`: a packed checkpoint in, the same with trained step sizes out."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path

from eqat_mm.checkpoint.read import load
from eqat_mm.checkpoint.verify import MANIFEST, verify_checkpoint
from eqat_mm.checkpoint.write import save_like
from eqat_mm.commands.models import best_device, load_model, load_tokenizer, model_folder
from eqat_mm.commands.quantize import default_output, finished, settings
from eqat_mm.commands.recipes import warn_without_recipe
from eqat_mm.data.windows import TextWindows, text_windows
from eqat_mm.errors import CheckpointError
from eqat_mm.quant.spec import QuantSpec
from eqat_mm.runtime.files import append_jsonl, write_json
from eqat_mm.runtime.progress import say
from eqat_mm.runtime.provenance import provenance
from eqat_mm.train.e2e_qp import STAGE, E2EQPConfig, WindowDataset, run_e2e_qp


@dataclass(frozen=True)
class E2EQPJob(E2EQPConfig):
    """E2E-QP of a packed model.

    Attributes:
        model: the full-precision model it was made from: names the default folders, teaches with `loss: kl`.
        bits: with `group_size`, finds the default Block-AP run of `model`.
        group_size: see `bits`.
        quantized: packed checkpoint to start from. Default: runs/MODEL-SPEC/block-ap/model.
        output: run folder; the checkpoint is `OUTPUT/model`. Default: runs/MODEL-SPEC/e2e-qp.
        data: text to train on.
        device: cpu, cuda, cuda:N, or auto.
        overwrite: discard a run that is already in the output folder.
        recipe_for: models that these settings were tuned for (set by recipes).
    """

    model: str = "smollm2-135m"
    bits: int = 2
    group_size: int = 64
    quantized: Path | None = None
    output: Path | None = None
    data: TextWindows = field(default_factory=lambda: TextWindows(length=4096, count=4096))
    device: str = "auto"
    overwrite: bool = False
    recipe_for: tuple[str, ...] = ()


def e2e_qp(job: E2EQPJob) -> Path:
    """Run or continue E2E-QP; return the folder of the checkpoint.

    Raises:
        EqatError: any bad input, before anything is written.
    """
    warn_without_recipe(job.model, job.recipe_for, STAGE)
    runs = default_output(job.model, QuantSpec(job.bits, job.group_size))
    base = job.quantized or runs / "block-ap" / "model"
    _require_block_ap(base, job)
    folder = job.output or runs / STAGE
    if finished(folder, overwrite=job.overwrite, config=settings(job)):
        return folder / "model"
    verify_checkpoint(base)
    device = best_device(job.device)
    windows = text_windows(load_tokenizer(base), job.data)
    teacher = load_model(model_folder(job.model), device) if job.loss == "kl" else None
    model = load(base, device=device, verify=False)
    record = provenance(STAGE, settings(job), job.seed)
    write_json(folder / "run.json", record)
    log = run_e2e_qp(model, WindowDataset(windows), job, folder / "trainer", teacher=teacher, device=device)
    (folder / "metrics.jsonl").unlink(missing_ok=True)
    for line in log:
        append_jsonl(folder / "metrics.jsonl", line)
    save_like(model, folder / "model", base, STAGE, record)
    shutil.rmtree(folder / "trainer", ignore_errors=True)
    say(f"checkpoint: {folder / 'model'}")
    return folder / "model"


def _require_block_ap(base: Path, job: E2EQPJob) -> None:
    if (base / MANIFEST).is_file():
        return
    raise CheckpointError(
        where=f"--quantized {base}",
        given="no packed checkpoint there",
        allowed="the output of Block-AP (or of round-to-nearest)",
        do=f"make it first: eqat block-ap --model {job.model} --quant.bits {job.bits}"
        f" --quant.group_size {job.group_size}, or name one with --quantized",
    )
