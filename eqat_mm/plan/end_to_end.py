"""E2E-QP and LLM-QAT: the whole model in memory, step sizes or all weights trained."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from eqat_mm.plan.amounts import Amount, Phase, amount, billions, largest, size
from eqat_mm.plan.costs import Costs, attention_flop, channels, costs_on, in_flight, kept
from eqat_mm.plan.machine import Machine
from eqat_mm.plan.shape import ModelShape
from eqat_mm.plan.storage import checkpoint_bytes, codes, scales
from eqat_mm.quant.spec import QuantSpec
from eqat_mm.train.e2e_qp import E2EQPConfig
from eqat_mm.train.end_to_end import EndToEndConfig
from eqat_mm.train.llm_qat import LLMQATConfig

CHECKPOINTING_FROM = 1e9
"""Parameters from which activations of blocks are recomputed in the backward, whatever the setting says."""

CONVERSATIONS, WORDS = 665_298, 270
"""LLaVA-1.5's instruction data: its conversations, and about how many tokens one has beside its image."""


@dataclass(frozen=True)
class Work:
    """What is trained on.

    Attributes:
        samples: number of them.
        longest: tokens of the longest, which decides the memory.
        mean: tokens of one on average, which decides the time.
        predicted: most tokens of one that are predicted.
        images: images of one.
    """

    samples: int
    longest: int
    mean: float
    predicted: int
    images: int = 0


def text_work(samples: int, length: int) -> Work:
    """Windows of text: every token is predicted."""
    return Work(samples, length, length, length)


def image_text_work(shape: ModelShape, samples: int, longest: int) -> Work:
    """Conversations about one image each; what is not the image counts as predicted, at most."""
    longest = max(longest, shape.image_tokens + WORDS)
    return Work(samples, longest, shape.image_tokens + WORDS, longest - shape.image_tokens, images=1)


def plan_e2e_qp(
    shape: ModelShape, spec: QuantSpec, config: E2EQPConfig, work: Work, machine: Machine, costs: Costs | None = None
) -> Phase:
    """Return what E2E-QP of a model packed by `spec` needs."""
    run = _E2EQP(shape, spec, config, work, machine, costs or costs_on(machine))
    name = "E2E-QP, images and text" if work.images else "E2E-QP, text"
    return run.phase(name)


def plan_llm_qat(
    shape: ModelShape, config: LLMQATConfig, work: Work, machine: Machine, costs: Costs | None = None
) -> Phase:
    """Return what LLM-QAT needs."""
    return _LLMQAT(shape, config.spec, config, work, machine, costs or costs_on(machine)).phase("LLM-QAT")


class _Run:
    """What both have in common; each method is one formula."""

    taught: bool
    """Whether a full-precision model predicts beside the trained one."""

    def __init__(
        self,
        shape: ModelShape,
        spec: QuantSpec,
        config: EndToEndConfig,
        work: Work,
        machine: Machine,
        costs: Costs,
    ) -> None:
        self.shape, self.spec, self.config, self.work = shape, spec, config, work
        self.machine, self.costs = machine, costs
        self.block, self.width = shape.largest, 2 if machine.is_gpu else 4
        self.precision = "bfloat16" if machine.is_gpu else "float32"
        if not machine.is_gpu and machine.precision == "bfloat16":
            self.precision = "autocast"
        self.recomputes = config.gradient_checkpointing or shape.parameters >= CHECKPOINTING_FROM
        self.batch = config.batch_size * work.longest
        per_step = config.batch_size * config.accumulation * machine.gpus
        self.steps = config.max_steps or math.ceil(work.samples * config.epochs / per_step)
        self.forwards = self.steps * config.accumulation
        self.stage = _zero_stage(config.deepspeed)

    def phase(self, name: str) -> Phase:
        """Return the phase."""
        device = self.states() + largest(self.at_the_loss(), self.in_a_block())
        process = amount(("process", self.machine.process, "Python, torch, transformers"))
        saving = ("saving", self.shape.stored * self.shape.unquantized, "what is not quantized, read again")
        host = process + amount(saving)
        gpu, ram = (device, host) if self.machine.is_gpu else (Amount(), host + device)
        return Phase(name, gpu, ram, self.disk(), self.written(), self.seconds(), self.machine.gpus)

    def states(self) -> Amount:
        """Memory of the model and of the optimizer."""
        raise NotImplementedError

    def resumable(self) -> float:
        """Bytes of one of the Trainer's checkpoints."""
        raise NotImplementedError

    def stored(self) -> float:
        """Bytes of the result."""
        return checkpoint_bytes(self.shape, self.spec)

    def flop(self) -> tuple[float, float]:
        """FLOP per token of products, by what they take at the rate of dense ones; and FLOP of the head."""
        raise NotImplementedError

    def teacher(self) -> Amount:
        """Memory of the full-precision model, where it teaches."""
        number = self.shape.parameters / (self.machine.gpus if self.stage == 3 else 1)
        return amount(("teacher", self.taught * self.width * number, f"{self.width} B x {billions(number)}"))

    def at_the_loss(self) -> Amount:
        """Memory when the loss is computed; a teacher's logits count once more."""
        logits = self.config.batch_size * self.work.predicted * self.shape.vocabulary
        width = 4 if self.precision == "float32" else 2
        each, head = self.costs.logit * width / 2 + self.taught * width, self.shape.vocabulary * self.shape.hidden
        copied = 2 * head if self.precision == "autocast" else 0
        return self._kept() + amount(
            ("logits", each * logits, f"{each:g} B x {billions(logits)}"),
            ("head in bfloat16", copied, f"2 B x {billions(head)}"),
        )

    def in_a_block(self) -> Amount:
        """Memory in the backward of one block."""
        per_token = in_flight(self.block, self.shape, 4 if self.precision == "float32" else 2)
        if self.recomputes:
            per_token += kept(self.block, self.shape, self.precision)
        scratch = self.costs.scratch * self.block.largest_linear
        return self._kept() + amount(
            ("one block", per_token * self.batch, f"{per_token / 1e3:.0f} kB x {self.batch} tokens"),
            ("scratch", scratch, f"{self.costs.scratch:g} B x {billions(self.block.largest_linear)}"),
        )

    def _kept(self) -> Amount:
        blocks = len(self.shape.blocks)
        if self.recomputes:
            each, what = self.width * self.shape.hidden, "inputs of blocks"
        else:
            each, what = kept(self.block, self.shape, self.precision), "activations"
        return amount((what, blocks * each * self.batch, f"{blocks} x {each / 1e3:.0f} kB x {self.batch} tokens"))

    def saves(self) -> int:
        """How often the Trainer saves: every so many steps, and at the end."""
        return math.ceil(self.steps / self.config.save_steps) if self.config.save_steps else 0

    def disk(self) -> Amount:
        """The result, and the Trainer's checkpoints: two are kept, a third is being written."""
        count = min(3, self.saves())
        return self._result() + self._resumables(count)

    def written(self) -> Amount:
        """The result and every checkpoint of the Trainer."""
        return self._result() + self._resumables(self.saves())

    def _result(self) -> Amount:
        return amount(("checkpoint", self.stored(), self.spec.name))

    def _resumables(self, count: int) -> Amount:
        return amount(("to resume from", count * self.resumable(), f"{count} x {size(self.resumable())}"))

    def seconds(self) -> Amount:
        """Products, what is moved in memory, the vision tower and what is written."""
        tokens = self.work.mean * self.config.batch_size * self.forwards
        products, head = self.flop()
        passes = 4.5 if self.recomputes else 3.5
        attention = sum(attention_flop(self.shape, 1, round(self.work.mean)) for _ in self.shape.blocks) * passes
        teaching = self.taught * 2 * (self.shape.weights + self.shape.vocabulary * self.shape.hidden)
        channel = sum(channels(block, self.shape) for block in self.shape.blocks)
        logits = self.shape.vocabulary * self.work.predicted / self.work.longest
        moved = tokens * (self.costs.touched_end_to_end * channel + self.costs.touched_logit * logits)
        tower = 2 * (self.shape.rest - self.shape.projector) * self.shape.patches * self.work.images
        images = tower * self.config.batch_size * self.forwards
        flop = tokens * (products + head + attention + teaching)
        written = self.written().total
        return amount(
            ("products", flop / self.machine.product, f"{flop / 1e15:.0f} PFLOP at the rate of dense ones"),
            ("memory", moved / self.machine.copy, f"{size(moved)} at {size(self.machine.copy)}/s"),
            ("vision tower", images / self.machine.product, f"{images / 1e15:.0f} PFLOP"),
            ("writing", written / self.machine.drive, f"{size(written)} at {size(self.machine.drive)}/s"),
        )


class _E2EQP(_Run):
    """Step sizes, and the projector where the settings say so."""

    config: E2EQPConfig

    @property
    def taught(self) -> bool:  # type: ignore[override]
        """Whether the loss compares with the full-precision model."""
        return self.config.loss == "kl"

    def states(self) -> Amount:
        """Packed codes, step sizes with their optimizer, what is not quantized."""
        packed, sizes = codes(self.shape, self.spec), scales(self.shape, self.spec)
        projector = self.shape.projector * ("projector" in self.config.trains)
        other = self.shape.unquantized
        return self.teacher() + amount(
            ("codes", packed, f"{self.spec.bits} bits x {billions(self.shape.weights)}, zero points"),
            ("step sizes", self.costs.step_size * sizes, f"{self.costs.step_size:g} B x {billions(sizes)}"),
            ("not quantized", self.width * other, f"{self.width} B x {billions(other)}"),
            ("projector", 16 * projector, f"16 B x {billions(projector)}"),
        )

    def resumable(self) -> float:
        """Model, step sizes in float32, and AdamW's two moments of what is trained."""
        sizes = scales(self.shape, self.spec)
        projector = self.shape.projector * ("projector" in self.config.trains)
        return codes(self.shape, self.spec) + 12 * sizes + self.width * self.shape.unquantized + 8 * projector

    def flop(self) -> tuple[float, float]:
        """Forward, its repetition, dx at the packed rate; ds at its own. The head is dense and frozen."""
        passes = 3 if self.recomputes else 2
        products = 2 * self.shape.weights * (passes / self.costs.packed_rate + 1 / self.costs.scale_rate)
        return products, 4 * self.shape.vocabulary * self.shape.hidden * self.work.predicted / self.work.longest


class _LLMQAT(_Run):
    """All weights of the language model."""

    config: LLMQATConfig

    @property
    def taught(self) -> bool:  # type: ignore[override]
        """Whether the loss compares with the full-precision model."""
        return self.config.loss == "logits"

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
        """Weights and AdamW in float32."""
        return 12 * self.shape.parameters

    def flop(self) -> tuple[float, float]:
        """Forward, dx, dW, and the forward once more where it is repeated."""
        passes = 4 if self.recomputes else 3
        return 2 * passes * self.shape.weights, 6 * self.shape.vocabulary * self.shape.hidden


def _zero_stage(deepspeed: str | None) -> int:
    """Return the stage in the name of DeepSpeed's settings, 0 where there are none."""
    digits = [character for character in Path(deepspeed or "").stem if character.isdigit()]
    return int(digits[0]) if digits else 0
