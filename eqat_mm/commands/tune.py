"""`eqat e2e-qp`: a packed checkpoint in, the same with trained step sizes out."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field
from pathlib import Path

from eqat_mm.checkpoint.read import load
from eqat_mm.checkpoint.verify import MANIFEST, verify_checkpoint
from eqat_mm.checkpoint.write import save_like
from eqat_mm.commands.models import best_device, load_model, load_tokenizer, model_folder, require_weights
from eqat_mm.commands.recipes import warn_without_recipe
from eqat_mm.commands.runs import begin_run, default_output, discard, require_single_process, settings, with_precision
from eqat_mm.data.windows import TextWindows, text_windows
from eqat_mm.errors import CheckpointError, ConfigError
from eqat_mm.quant.spec import QuantSpec
from eqat_mm.runtime.files import write_jsonl
from eqat_mm.runtime.progress import say
from eqat_mm.train.e2e_qp import STAGE, E2EQPConfig, WindowDataset, run_e2e_qp


@dataclass(frozen=True)
class E2EQPJob(E2EQPConfig):
    """E2E-QP of a packed model.

    Attributes:
        model: the full-precision model it was made from: names the default folders, teaches with `loss: kl`.
        quant: finds the default Block-AP run of `model`; the checkpoint itself knows its spec.
        quantized: packed checkpoint to start from. Default: runs/MODEL-SPEC/block-ap/model.
        output: run folder; the checkpoint is `OUTPUT/model`. Default: runs/MODEL-SPEC/e2e-qp.
        data: text to train on.
        device: cpu, cuda, cuda:N, or auto.
        overwrite: discard a run that is already in the output folder.
        recipe_for: models that these settings were tuned for (set by recipes).
    """

    model: str = "smollm2-135m"
    quant: QuantSpec = field(default_factory=QuantSpec)
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
    require_single_process(STAGE)
    warn_without_recipe(job.model, job.recipe_for, STAGE)
    runs = default_output(job.model, job.quant)
    base = job.quantized or runs / "block-ap" / "model"
    _require_block_ap(base, job)
    folder = job.output or runs / STAGE
    _require_apart(base, folder)
    device = best_device(job.device)
    windows = text_windows(load_tokenizer(base), job.data)
    verify_checkpoint(base)
    if job.loss == "kl":
        require_weights(model_folder(job.model))
    if job.overwrite:
        discard(folder)
    job = with_precision(job, folder, device)
    record = begin_run(folder, STAGE, settings(job, windows), job.seed)
    if record is None:
        return folder / "model"
    teacher = load_model(model_folder(job.model), device) if job.loss == "kl" else None
    model = load(base, device=device, verify=False)
    log = run_e2e_qp(model, WindowDataset(windows), job, folder / "trainer", teacher=teacher, device=device)
    write_jsonl(folder / "metrics.jsonl", log)
    save_like(model, folder / "model", base, STAGE, record)
    discard(folder / "trainer")
    say(f"checkpoint: {folder / 'model'}")
    return folder / "model"


def _require_block_ap(base: Path, job: E2EQPJob) -> None:
    if (base / MANIFEST).is_file():
        return
    raise CheckpointError(
        where=f"--quantized {base}",
        given="no packed checkpoint there",
        allowed="the output of Block-AP (or of round-to-nearest)",
        do=f"make it first: {_block_ap_command(base, job)}, or name one with --quantized",
    )


def _block_ap_command(base: Path, job: E2EQPJob) -> str:
    """Return the command that makes the checkpoint `base`."""
    words = ["eqat", "block-ap", "--model", job.model]
    for name, value in job.quant.as_dict().items():
        if value != getattr(QuantSpec, name):
            words += [f"--quant.{name}", str(value).lower() if isinstance(value, bool) else str(value)]
    if job.quantized is not None:
        words += ["--output", str(base.parent)]
    return shlex.join(words)


def _require_apart(base: Path, folder: Path) -> None:
    if base.resolve().is_relative_to(folder.resolve()):
        raise ConfigError(
            where=f"--output {folder}",
            given=f"the folder that holds --quantized {base}",
            allowed="a folder of its own",
            do="choose another --output: E2E-QP reads the one and writes the other",
        )
