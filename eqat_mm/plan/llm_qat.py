"""LLM-QAT: all weights, trained in float32."""

from __future__ import annotations

from eqat_mm.plan.amounts import Amount, Phase, amount, billions
from eqat_mm.plan.costs import Costs, costs_on
from eqat_mm.plan.end_to_end import EndToEnd, Work
from eqat_mm.plan.machine import Machine
from eqat_mm.plan.shape import ModelShape
from eqat_mm.train.llm_qat import LLMQATConfig


def plan_llm_qat(
    shape: ModelShape, config: LLMQATConfig, work: Work, machine: Machine, costs: Costs | None = None
) -> Phase:
    """Return what LLM-QAT needs."""
    return _LLMQAT(shape, config.spec, config, work, machine, costs or costs_on(machine)).phase("LLM-QAT")


class _LLMQAT(EndToEnd):
    """All weights of the language model."""

    config: LLMQATConfig

    @property
    def taught(self) -> bool:  # type: ignore[override]
        """Whether the loss compares with the full-precision model."""
        return self.config.loss == "kl"

    def states(self) -> Amount:
        """Weights, gradients and AdamW in float32, divided as DeepSpeed's stage says."""
        number, gpus = self.shape.parameters, self.machine.gpus
        parts = (("weights", 4, 3), ("gradients", 4, 2), ("AdamW", 8, 1))
        rows = []
        for what, each, stage in parts:
            share = gpus if self.stage >= stage else 1
            divided = f" / {share}" if share > 1 else ""
            rows.append((what, each * number / share, f"{each} B x {billions(number)}{divided}"))
        return self.teacher() + amount(*rows)

    def resumable(self) -> float:
        """Weights and AdamW in float32; under DeepSpeed the weights once more."""
        return (16 if self.stage else 12) * self.shape.parameters

    def flop(self) -> tuple[float, float]:
        """Forward, dx, dW, and the forward once more where it is repeated."""
        passes = 4 if self.recomputes else 3
        return 2 * passes * self.shape.passed, 6 * self.shape.vocabulary * self.shape.hidden
