"""Plan and verdict of a phase in one: what it needs on a machine, whether that is there, what would help."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from eqat_mm.plan.block_ap import plan_block_ap
from eqat_mm.plan.e2e_qp import plan_e2e_qp
from eqat_mm.plan.end_to_end import Work
from eqat_mm.plan.machine import Machine
from eqat_mm.plan.options import block_ap_options, e2e_qp_options
from eqat_mm.plan.shape import ModelShape
from eqat_mm.plan.verdict import MARGIN, Verdict, judge, shortages
from eqat_mm.quant.spec import QuantSpec
from eqat_mm.train.block_ap import BlockAPConfig
from eqat_mm.train.e2e_qp import E2EQPConfig


def judged_block_ap(shape: ModelShape, config: BlockAPConfig, work: Work, machine: Machine) -> Verdict:
    """Return the verdict on Block-AP with these samples, `spool` decided."""
    config = replace(config, spool=spool_for(shape, config, work, machine))
    phase = plan_block_ap(shape, config, work, machine)
    return judge(phase, machine, block_ap_options(shape, config, work, machine))


def spool_for(shape: ModelShape, config: BlockAPConfig, work: Work, machine: Machine) -> Literal["ram", "disk"]:
    """Return where Block-AP keeps its streams: in RAM if they fit, an error of the plan included, or nowhere do."""
    if config.spool != "auto":
        return config.spool
    in_ram, on_disk = (plan_block_ap(shape, replace(config, spool=where), work, machine) for where in ("ram", "disk"))
    tight = machine.ram is not None and MARGIN * in_ram.ram.total > machine.ram
    return "disk" if tight and not shortages(on_disk, machine) else "ram"


def judged_e2e_qp(shape: ModelShape, spec: QuantSpec, config: E2EQPConfig, work: Work, machine: Machine) -> Verdict:
    """Return the verdict on E2E-QP of a model of this spec."""
    phase = plan_e2e_qp(shape, spec, config, work, machine)
    return judge(phase, machine, e2e_qp_options(shape, spec, config, work, machine))
