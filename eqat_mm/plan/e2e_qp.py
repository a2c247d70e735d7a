"""E2E-QP: the packed model, and the step sizes that are trained."""

from __future__ import annotations

from eqat_mm.plan.amounts import Amount, Phase, amount, billions
from eqat_mm.plan.costs import Costs, costs_on
from eqat_mm.plan.end_to_end import EndToEnd, Work
from eqat_mm.plan.machine import Machine
from eqat_mm.plan.shape import ModelShape
from eqat_mm.plan.storage import codes, scales
from eqat_mm.quant.spec import QuantSpec
from eqat_mm.train.e2e_qp import E2EQPConfig
from eqat_mm.train.kept_teacher import KEPT

LARGEST_FILE = 8 << 30
"""Bytes of a teacher's hidden states up to which they are kept by themselves."""


def plan_e2e_qp(
    shape: ModelShape, spec: QuantSpec, config: E2EQPConfig, work: Work, machine: Machine, costs: Costs | None = None
) -> Phase:
    """Return what E2E-QP of a model packed by `spec` needs."""
    run = _E2EQP(shape, spec, config, work, machine, costs or costs_on(machine))
    name = "E2E-QP, images and text" if work.images else "E2E-QP, text"
    return run.phase(name)


def keeps_teacher(shape: ModelShape, spec: QuantSpec, config: E2EQPConfig, work: Work, machine: Machine) -> bool:
    """Return whether the teacher's hidden states are kept in a file, `auto` decided."""
    return _E2EQP(shape, spec, config, work, machine, costs_on(machine)).keeps


class _E2EQP(EndToEnd):
    """Step sizes, and the projector where the settings say so."""

    config: E2EQPConfig

    @property
    def taught(self) -> bool:  # type: ignore[override]
        """Whether the loss compares with the full-precision model."""
        return self.config.loss == "kl"

    @property
    def keeps(self) -> bool:
        """Whether the teacher is a file: of its own accord for text alone, all of it read, and small enough."""
        if not self.taught or self.config.teacher != "auto":
            return self.taught and self.config.teacher == "cache"
        text = not self.work.images and not self.shape.projector and self.stage != 3
        return text and self.visited >= self.work.samples and self._kept_teacher().total <= LARGEST_FILE

    def teacher(self) -> Amount:
        """Memory of the full-precision model, unless its hidden states are in a file."""
        return Amount() if self.keeps else super().teacher()

    def before(self) -> Amount:
        """Memory of the full-precision model while that file is made."""
        return super().teacher() if self.keeps else Amount()

    def teaching(self) -> float:
        """FLOP per token of the teacher: head, and once for each sample what stands before it."""
        if not self.keeps:
            return super().teaching()
        once = self.work.samples / (self.config.batch_size * self.forwards * self.machine.gpus)
        return 2.0 * (self.shape.passed * once + self.shape.vocabulary * self.shape.hidden)

    def disk(self) -> Amount:
        """As ever, and the teacher's file."""
        return super().disk() + (self._kept_teacher() if self.keeps else Amount())

    def written(self) -> Amount:
        """As ever, and the teacher's file."""
        return super().written() + (self._kept_teacher() if self.keeps else Amount())

    def _kept_teacher(self) -> Amount:
        tokens, each = self.work.samples * self.work.longest, KEPT.itemsize * self.shape.hidden
        return amount(("teacher's hidden states", tokens * each, f"{each} B x {billions(tokens)} tokens"))

    def states(self) -> Amount:
        """Packed codes, step sizes with their optimizer, what is not quantized."""
        packed, sizes = codes(self.shape, self.spec), scales(self.shape, self.spec)
        projector = self.shape.projector * ("projector" in self.config.trained)
        other = self.shape.unquantized
        # the peak is where the backward begins: gradients are there if they are kept from an earlier one
        kept = sizes if self.config.accumulation > 1 or self.stage else sizes / len(self.shape.blocks)
        return self.teacher() + amount(
            ("codes", packed, f"{self.spec.widths} bits x {billions(self.shape.weights)}, zero points"),
            ("step sizes", self.costs.step_size * sizes, f"{self.costs.step_size:g} B x {billions(sizes)}"),
            ("their gradients", self.costs.step_gradient * kept, f"{self.costs.step_gradient:g} B x {billions(kept)}"),
            ("not quantized", self.width * other, f"{self.width} B x {billions(other)}"),
            ("projector", 16 * projector, f"16 B x {billions(projector)}"),
        )

    def resumable(self) -> float:
        """What is trained and AdamW's two moments of it in float32; under DeepSpeed its weights once more."""
        projector = self.shape.projector * ("projector" in self.config.trained)
        return (16 if self.stage else 12) * (scales(self.shape, self.spec) + projector)

    def flop(self) -> tuple[float, float]:
        """Forward, its repetition, dx at the packed rate; ds at its own. The head is dense and frozen."""
        passes = 3 if self.recomputes else 2
        products = 2 * self.shape.passed * (passes / self.costs.packed_rate + 1 / self.costs.scale_rate)
        return products, 4 * self.shape.vocabulary * self.shape.hidden * self.work.predicted / self.work.longest
