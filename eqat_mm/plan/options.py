"""What one can change about a phase, by the flags of its command."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Literal, TypeVar

from eqat_mm.plan.block_ap import plan_block_ap
from eqat_mm.plan.e2e_qp import plan_e2e_qp
from eqat_mm.plan.end_to_end import Work
from eqat_mm.plan.llm_qat import plan_llm_qat
from eqat_mm.plan.machine import Machine
from eqat_mm.plan.shape import ModelShape
from eqat_mm.plan.verdict import Option
from eqat_mm.quant.spec import QuantSpec
from eqat_mm.train.block_ap import BlockAPConfig
from eqat_mm.train.e2e_qp import E2EQPConfig
from eqat_mm.train.end_to_end import EndToEndConfig
from eqat_mm.train.llm_qat import LLMQATConfig

C = TypeVar("C", bound=EndToEndConfig)


def block_ap_options(shape: ModelShape, config: BlockAPConfig, work: Work, machine: Machine) -> Iterator[Option]:
    """Yield what lowers GPU memory, RAM or disk of Block-AP, the least harmful first."""

    def option(flags: str, changed: BlockAPConfig, count: int = work.samples) -> Option:
        return flags, lambda: plan_block_ap(shape, changed, replace(work, samples=count), machine)

    if config.token_weights == "gradient":
        yield option("--token_weights equal", replace(config, token_weights="equal"))
    single = replace(config, fit=replace(config.fit, batch_size=1))
    yield option("--fit.batch_size 1", single)
    if not machine.is_gpu and config.stream_dtype == "float32":
        yield option("--stream_dtype bfloat16", replace(config, stream_dtype="bfloat16"))
    other: Literal["ram", "disk"] = "ram" if config.spool == "disk" else "disk"
    yield option(f"--spool {other}", replace(config, spool=other))
    for count in (work.samples // 2, work.samples // 4, work.samples // 16):
        yield option(f"--calibration.count {count}", config, count)


def e2e_qp_options(
    shape: ModelShape, spec: QuantSpec, config: E2EQPConfig, work: Work, machine: Machine
) -> Iterator[Option]:
    """Yield what lowers the memory of E2E-QP, the least harmful first."""
    for flags, changed, done in _end_to_end(config, work):
        yield flags, lambda changed=changed, done=done: plan_e2e_qp(shape, spec, changed, done, machine)  # type: ignore[misc]
    if config.loss == "kl":
        labels = replace(config, loss="cross-entropy")
        yield "--loss cross-entropy", lambda: plan_e2e_qp(shape, spec, labels, work, machine)


def llm_qat_options(shape: ModelShape, config: LLMQATConfig, work: Work, machine: Machine) -> Iterator[Option]:
    """Yield what lowers the memory of LLM-QAT, the least harmful first."""
    for flags, changed, done in _end_to_end(config, work):
        yield flags, lambda changed=changed, done=done: plan_llm_qat(shape, changed, done, machine)  # type: ignore[misc]
    divided = replace(config, deepspeed="zero-3")
    for gpus in (2, 4, 8, 16, 32):
        phase = plan_llm_qat(shape, divided, work, replace(machine, gpus=gpus))
        if machine.usable and phase.gpu.total <= machine.usable:
            yield f"--deepspeed zero-3 on {gpus} GPUs", lambda phase=phase: phase  # type: ignore[misc]
            return


def _end_to_end(config: C, work: Work) -> Iterator[tuple[str, C, Work]]:
    yield "--gradient_checkpointing true", replace(config, gradient_checkpointing=True), work
    if config.batch_size > 1:
        accumulation = config.batch_size * config.accumulation
        single = replace(config, batch_size=1, accumulation=accumulation)
        yield "--batch_size 1" if config.global_batch else f"--batch_size 1 --accumulation {accumulation}", single, work
    if not work.images:
        half = work.longest // 2
        yield f"--data.length {half}", config, Work(2 * work.samples, half, half, half)
