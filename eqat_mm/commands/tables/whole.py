"""`eqat quantize`: a plan, Block-AP, E2E-QP and an evaluation of both, as one.

Each phase is the job of a command of its own, with the recipe and the run folder that this command would take. A
stopped `eqat quantize` goes on where it stopped, and so does one of whose phases some were run by their own commands.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from eqat_mm.checkpoint.folders import load_tokenizer
from eqat_mm.commands.line.model_config import sees
from eqat_mm.commands.line.resolved import job_of, words_of
from eqat_mm.commands.plumbing.calibration import planned_work
from eqat_mm.commands.plumbing.models import model_folder, require_weights
from eqat_mm.commands.plumbing.preflight import require_fits, work_of
from eqat_mm.commands.plumbing.runs import default_output, require_startable, settings
from eqat_mm.commands.plumbing.samples import checked_samples
from eqat_mm.commands.plumbing.shapes import model_shape
from eqat_mm.commands.tables.rungs import Rungs
from eqat_mm.commands.verbs.evaluate import Bench
from eqat_mm.commands.verbs.quantize import BlockAPJob, block_ap
from eqat_mm.commands.verbs.tune import E2EQPJob, e2e_qp, stage_of
from eqat_mm.data.text.settings import TextWindows
from eqat_mm.data.text.windows import text_windows
from eqat_mm.errors import ConfigError
from eqat_mm.plan.finish import plan_evaluation
from eqat_mm.plan.judged import judged_block_ap, judged_e2e_qp
from eqat_mm.plan.machine import this_machine
from eqat_mm.plan.table import advice, summary
from eqat_mm.plan.verdict import Verdict, judge
from eqat_mm.quant.spec import GroupSize, WeightBits
from eqat_mm.runtime.device import best_device, processes
from eqat_mm.runtime.place import Place
from eqat_mm.runtime.progress import say
from eqat_mm.runtime.provenance import provenance
from eqat_mm.runtime.settings import Count, Settings

_BATCH = 4
"""Windows per forward of the evaluation."""


@dataclass(frozen=True)
class QuantizeJob(Settings):
    """Block-AP and E2E-QP of a model, with a plan before and a table after them.

    Attributes:
        model: model folder, alias (`eqat assets`) or hub repository.
        bits: of a weight.
        group_size: weights that share a step size; null takes the recipe's, or 64.
        symmetric: on the symmetric grid, which llama.cpp and vLLM hold exactly; null takes the recipe's.
        allocation: file of `eqat allocate` that gives each linear bits of its own; `bits` then only chooses recipes.
        text: text to fit the blocks on, and to tune a language model on; a side of it is held out to judge by.
        conversations: conversations to tune the model on, in LLaVA's format; about images where it sees.
        images: folder that the image paths in conversations are relative to.
        plan: print the plan, and end.
        block_ap: recipe or YAML file with other settings of `eqat block-ap`.
        e2e_qp: recipe or YAML file with other settings of `eqat e2e-qp`.
        data: held-out text that judges; its source is `text` by default.
        batch_size: windows per forward of the evaluation.
        output: folder of all runs. Default: runs/MODEL-SPEC.
        device: what to compute on: cpu, cuda, cuda:N, or auto.
        overwrite: discard what is there already, and begin anew.
    """

    model: str
    bits: WeightBits = 2
    group_size: GroupSize | None = None
    symmetric: bool | None = None
    allocation: Path | None = None
    text: str | None = None
    conversations: str | None = None
    images: Path | None = None
    plan: bool = False
    block_ap: str | None = None
    e2e_qp: str | None = None
    data: TextWindows = field(default_factory=lambda: TextWindows(part="held_out", length=512, count=64))
    batch_size: Count = _BATCH
    output: Path | None = None
    device: str = "auto"
    overwrite: bool = False


@dataclass(frozen=True)
class _Phases:
    """What is done, in order.

    Attributes:
        root: folder of all runs.
        fit: Block-AP.
        tuned: E2E-QP; None where it is left out.
        data: held-out text.
        sees: whether the model takes images.
    """

    root: Path
    fit: BlockAPJob
    tuned: E2EQPJob | None
    data: TextWindows
    sees: bool

    @property
    def fitted(self) -> Path:
        """Folder of what Block-AP makes."""
        return (self.fit.output or self.root / "block-ap") / "model"


def quantize(job: QuantizeJob) -> list[dict[str, Any]]:
    """Quantize a model in both phases, or go on with that; print the table, write `results.json`, return its rows.

    Returns:
        One for each stage: perplexity, KL and top-1 agreement with full precision, bits per weight, seconds. None
        with `plan`.

    Raises:
        EqatError: any bad input, or too little memory or disk, before Block-AP begins.
    """
    _require_single_process(job)
    phases = _phases(job)
    verdicts = list(_verdicts(phases, job))
    head = f"plan of {job.model}, {phases.fit.quant.resolved().name}, in {phases.root}"
    say("\n".join([head, summary(verdicts), *advice(verdicts)]))
    if phases.tuned is None:
        say(_left_out(job))
    if job.plan:
        return []
    for verdict in verdicts:
        require_fits(verdict)
    rungs = _rungs(phases, job)
    rungs.add("full precision", lambda: model_folder(job.model))
    made = rungs.add("Block-AP", lambda: block_ap(phases.fit))
    if phases.tuned is not None:
        tuned = replace(phases.tuned, quantized=made)
        made = rungs.add("Block-AP + E2E-QP", lambda: e2e_qp(tuned))
    say(_closing(job, phases, made))
    return rungs.rows


def _phases(job: QuantizeJob) -> _Phases:
    """Return the jobs of both phases, each as its command would take it.

    Raises:
        ConfigError: settings that cannot be, or data of the wrong kind.
    """
    fit = job_of("block-ap", BlockAPJob, _block_ap_words(job))
    fit.calibration.require_source("--text")
    root, data = job.output or default_output(job.model, fit.quant), job.data
    if data.source is None:
        same = ("source", "text_field", "held_out_fraction", "split_seed")
        data = replace(data, **{name: getattr(fit.calibration, name) for name in same})
    with_images = sees(job.model)
    left_out = with_images and job.conversations is None and job.e2e_qp is None
    return _Phases(root, fit, None if left_out else _tuned(job, fit, root, with_images), data, with_images)


def _tuned(job: QuantizeJob, fit: BlockAPJob, root: Path, with_images: bool) -> E2EQPJob:
    """Return E2E-QP as its command takes it; conversations stand for the text, unless both are to be mixed."""
    base = None if job.output is None else job.output / "block-ap" / "model"
    given = {"quantized": base, "data.source": None if with_images else fit.calibration.source}
    given |= {"conversations.source": job.conversations, "conversations.image_folder": job.images}
    words = _words(_common(job, job.e2e_qp, "e2e-qp"), {"quant": settings(fit.quant)}, given)
    tuned = job_of("e2e-qp", E2EQPJob, words)
    if job.conversations is not None and tuned.text_share is None:
        tuned = replace(tuned, data=replace(tuned.data, source=None))
    return tuned.with_data_decided(str(root), tuned.model)


def _block_ap_words(job: QuantizeJob) -> list[str]:
    spec = {"quant.bits": job.bits, "quant.group_size": job.group_size, "quant.symmetric": job.symmetric}
    more = {"quant.allocation": job.allocation, "calibration.source": job.text}
    return _words(_common(job, job.block_ap, "block-ap"), spec, more)


def _common(job: QuantizeJob, config: str | None, folder: str) -> dict[str, Any]:
    return {
        "config": config,
        "model": job.model,
        "output": None if job.output is None else job.output / folder,
        "device": None if job.device == "auto" else job.device,
        "overwrite": job.overwrite or None,
    }


def _words(*given: dict[str, Any]) -> list[str]:
    """Return options as they are typed; None is one that is not given."""
    return words_of(*({name: value for name, value in each.items() if value is not None} for each in given))


def _verdicts(phases: _Phases, job: QuantizeJob) -> Iterator[Verdict]:
    """Yield what each phase needs here, before anything but the model's configuration is downloaded."""
    fit = replace(phases.fit, quant=phases.fit.quant.resolved())
    machine = this_machine(best_device(job.device), phases.root)
    shape = model_shape(job.model, fit.adapter)
    yield judged_block_ap(shape, fit, planned_work(shape, fit.calibration, fit.conversations, fit.image_share), machine)
    if phases.tuned is not None:
        work = work_of(shape, phases.tuned.conversations or phases.tuned.data)
        yield judged_e2e_qp(shape, fit.quant, phases.tuned, work, machine)
    held_out = phases.data
    phase = plan_evaluation(shape, held_out.count or 64, held_out.length, job.batch_size, machine)
    yield judge(phase, machine)


def _rungs(phases: _Phases, job: QuantizeJob) -> Rungs:
    """Look through all data, that of the last phase too, before the first phase takes its hours."""
    folder = model_folder(job.model)
    require_weights(folder)
    windows = text_windows(load_tokenizer(folder), phases.data)
    require_startable(phases.fit, Place.within(phases.fitted.parent))
    if phases.tuned is not None:
        output = phases.tuned.output or phases.root / stage_of(phases.tuned)
        require_startable(phases.tuned, Place.within(output))
        checked_samples(folder, phases.tuned, output)
    bench = Bench(folder, windows, job.batch_size, "auto", best_device(job.device))
    made_by = provenance("quantize", settings(job), phases.fit.seed)
    return Rungs(bench, phases.root, "quantize", job.model, phases.fit.quant, made_by, anew=job.overwrite)


def _left_out(job: QuantizeJob) -> str:
    return (
        f"E2E-QP, the second phase, is left out: {job.model} is tuned on conversations about images, and none are "
        f"named. This adds it, and does not repeat Block-AP: {_again(job)}"
    )


def _again(job: QuantizeJob) -> str:
    usual = words_of(settings(QuantizeJob(model=job.model)))
    said = [word for word in words_of(settings(replace(job, plan=False))) if word not in usual]
    return f"{shlex.join(['eqat', 'quantize', job.model, *said])} --conversations FILE.json --images FOLDER"


def _closing(job: QuantizeJob, phases: _Phases, made: Path) -> str:
    """Say where the model is and what to do with it."""
    where = shlex.quote(str(made))
    lines = [f"the model: {made}", "next:"]
    if phases.tuned is None:
        lines.append(f"  {_again(job)}")
    if not phases.sees:
        lines.append(f'  eqat generate {where} --prompt "The capital of France is"')
    else:
        lines.append(f"  eqat chat {where}")
        lines.append(f"  eqat eval {where} --tasks mme --reference {shlex.quote(job.model)}")
    return "\n".join([*lines, f"  python: model = eqat_mm.load({str(made)!r})"])


def _require_single_process(job: QuantizeJob) -> None:
    """Check that no launcher started several copies.

    Raises:
        ConfigError: one did; says how each phase is started by its own.
    """
    if processes() > 1:
        raise ConfigError(
            where="eqat quantize: WORLD_SIZE",
            given=f"{processes()} processes",
            allowed="one: each phase has a launcher of its own",
            do=f"torchrun --nproc_per_node {processes()} -m eqat_mm block-ap --model {job.model} ..., then deepspeed "
            f"--num_gpus {processes()} --module eqat_mm e2e-qp --model {job.model} ..., then eqat quantize, which "
            "takes what they made and evaluates it",
        )
