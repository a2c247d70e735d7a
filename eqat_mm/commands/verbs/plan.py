"""`eqat plan`: what every phase of a run will need, from the configuration and the settings alone."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from eqat_mm.blocks.quantized import refuse_named_quantized
from eqat_mm.commands.line.recipes import fitting_recipe
from eqat_mm.commands.plumbing.calibration import planned_work
from eqat_mm.commands.plumbing.models import refuse_packed
from eqat_mm.commands.plumbing.shapes import configuration_of, shape_of
from eqat_mm.data.image_text.settings import Conversations, ImageTextData
from eqat_mm.data.text.settings import TextWindows
from eqat_mm.plan.amounts import Phase, billions
from eqat_mm.plan.end_to_end import CONVERSATIONS, Work, image_text_work, text_work
from eqat_mm.plan.finish import plan_checkpoint, plan_evaluation
from eqat_mm.plan.judged import judged_block_ap, judged_e2e_qp
from eqat_mm.plan.llm_qat import plan_llm_qat
from eqat_mm.plan.machine import Machine, card, this_machine
from eqat_mm.plan.options import llm_qat_options
from eqat_mm.plan.shape import ModelShape
from eqat_mm.plan.storage import average_bits
from eqat_mm.plan.table import details, summary
from eqat_mm.plan.verdict import Verdict, judge, with_ram_and_disk
from eqat_mm.quant.spec import QuantSpec
from eqat_mm.runtime.device import best_device
from eqat_mm.runtime.progress import say
from eqat_mm.runtime.settings import Count, Fraction, PositiveOrZero
from eqat_mm.train.block_ap import BlockAPConfig
from eqat_mm.train.e2e_qp import E2EQPConfig
from eqat_mm.train.llm_qat import LLMQATConfig


@dataclass(frozen=True)
class PlanJob(BlockAPConfig):
    """What quantizing a model will need. Block-AP's settings are flags as in `eqat block-ap`, its recipe counts.

    Attributes:
        model: alias, hub repository, model folder or config.json; nothing is downloaded for those that are shipped.
        gpu: 3090, 4090, 5090, l40s, a100, h100, h200 or cpu. Default: what this machine has.
        gpus: number of them; Block-AP uses one.
        ram: free RAM in GB. Default: of this machine, unless a card is named.
        disk: free disk in GB. Default: where `output` is, unless a card is named.
        output: folder of the runs.
        calibration: text of Block-AP.
        e2e_qp: settings of E2E-QP; null takes the recipe for the model, or the defaults.
        data: text of E2E-QP; null takes the recipe for the model, or 4096 windows of 4096 tokens.
        image_share: share of conversations about images among the samples of Block-AP.
        conversations: number of conversations about images of E2E-QP, of a vision-language model.
        llm_qat: settings of LLM-QAT.
        evaluation: held-out text.
        adapter: name of the architecture, where config.json does not decide it.
        json: print JSON, with every term of every number.
        recipe_for: models that these settings were tuned for (set by recipes).
    """

    model: str = field(kw_only=True)
    gpu: str | None = None
    gpus: Count = 1
    ram: PositiveOrZero | None = None
    disk: PositiveOrZero | None = None
    output: Path = Path("runs")
    calibration: TextWindows = field(default_factory=lambda: TextWindows(count=4096))
    e2e_qp: E2EQPConfig | None = None
    data: TextWindows | None = None
    image_share: Fraction = 0.0
    conversations: Count = CONVERSATIONS
    llm_qat: LLMQATConfig = field(default_factory=LLMQATConfig)
    evaluation: TextWindows = field(default_factory=lambda: TextWindows(part="held_out", length=512, count=64))
    adapter: str | None = None
    json: bool = False
    recipe_for: tuple[str, ...] = ()


def plan(job: PlanJob) -> list[Verdict]:
    """Print and return what every phase needs and whether it fits.

    Raises:
        EqatError: an unknown model or card, a model that is quantized already, or a group size that does not divide a
            layer.
    """
    config, path = configuration_of(job.model)
    if path.is_file():
        refuse_packed(job.model, path.parent)
    refuse_named_quantized(path, config)
    shape, machine = shape_of(config, path, job.adapter), _machine(job)
    spec = job.quant.resolved()
    verdicts = list(_verdicts(job, spec, shape, machine))
    say(_as_json(job, machine, verdicts) if job.json else _as_text(job, spec, shape, machine, verdicts))
    return verdicts


def _machine(job: PlanJob) -> Machine:
    if job.gpu in (None, "cpu"):
        machine = this_machine(best_device(job.gpu or "auto"), job.output, job.gpus)
    else:
        machine = card(str(job.gpu), job.gpus)
    return with_ram_and_disk(machine, job.ram, job.disk)


def _verdicts(job: PlanJob, spec: QuantSpec, shape: ModelShape, machine: Machine) -> Iterator[Verdict]:
    samples, length = job.calibration.count or 4096, job.calibration.length
    seen = Conversations("") if job.image_share else None
    work = planned_work(shape, job.calibration, seen, job.image_share)
    yield judged_block_ap(shape, replace(job, quant=spec), work, machine)
    for config, work in _end_to_end(job, shape):
        yield judged_e2e_qp(shape, spec, config, work, machine)
    work = text_work(samples, length)
    phase = plan_llm_qat(shape, job.llm_qat, work, machine)
    yield judge(phase, machine, llm_qat_options(shape, job.llm_qat, work, machine))
    yield judge(plan_evaluation(shape, job.evaluation.count or 64, job.evaluation.length, 4, machine), machine)
    yield judge(plan_checkpoint(shape, spec, machine), machine)


def _end_to_end(job: PlanJob, shape: ModelShape) -> Iterator[tuple[E2EQPConfig, Work]]:
    """Yield what E2E-QP is planned for: text, and images and text where the model sees."""
    tuned = _recipe("e2e-qp", job)
    data = job.data or TextWindows(**({"length": 4096, "count": 4096} | tuned.get("data", {})))
    config = job.e2e_qp or _e2e_qp_settings(tuned)
    about_images = job.e2e_qp is None and "conversations" in tuned
    yield E2EQPConfig() if about_images else config, text_work(data.count or 4096, data.length)
    if shape.patches:
        longest = tuned.get("conversations", {}).get("max_length", ImageTextData.max_length)
        yield config, image_text_work(shape, job.conversations, longest)


def _recipe(command: str, job: PlanJob) -> Mapping[str, Any]:
    """Return the settings of the recipe that a command would take, empty where there is none."""
    found = fitting_recipe(command, job.model, str(job.quant.bits), job.quant.group_size)
    return {} if found is None else found.settings


def _e2e_qp_settings(tuned: Mapping[str, Any]) -> E2EQPConfig:
    """Return E2E-QP's own settings in a recipe."""
    return E2EQPConfig(**{item.name: tuned[item.name] for item in fields(E2EQPConfig) if item.name in tuned})


def _as_text(job: PlanJob, spec: QuantSpec, shape: ModelShape, machine: Machine, verdicts: list[Verdict]) -> str:
    memory = f", {machine.memory / 2**30:.1f} GiB" if machine.memory else ""
    where = f"{machine.gpus} x {machine.name}" if machine.gpus > 1 else machine.name
    bits = f", {average_bits(shape, spec):.2f} bits per weight" if spec.table else ""
    blocks, head = len(shape.blocks), f"{job.model}, {spec.name}{bits}: {billions(shape.parameters)} parameters"
    experts, sent = shape.largest.experts, shape.largest.sent
    routed = f" of {experts} experts, {sent} for each token" if experts else ""
    lines = [f"{head}, {blocks} blocks{routed}", f"on {where}{memory} (rates: {machine.origin})"]
    if job.recipe_for:
        lines.append(f"settings of Block-AP: the recipe for {', '.join(job.recipe_for)}")
    return "\n".join([*lines, "", summary(verdicts), details(verdicts)])


def _as_json(job: PlanJob, machine: Machine, verdicts: list[Verdict]) -> str:
    phases = [_record(verdict) for verdict in verdicts]
    return json.dumps({"model": job.model, "machine": _plain(machine), "phases": phases}, indent=2)


def _plain(machine: Machine) -> dict[str, Any]:
    return {name: None if value == float("inf") else value for name, value in asdict(machine).items()}


def _record(verdict: Verdict) -> dict[str, Any]:
    phase = verdict.phase
    return {
        "name": phase.name,
        **{name: _total(phase, name) for name in ("gpu", "ram", "disk", "written", "seconds")},
        "processes": phase.processes,
        "fits": verdict.fits,
        "short": [asdict(shortage) for shortage in verdict.shortages],
        "cures": list(verdict.cures),
        "cards": list(verdict.cards),
    }


def _total(phase: Phase, name: str) -> dict[str, Any]:
    amount = getattr(phase, name)
    return {"total": amount.total, **asdict(amount)}
