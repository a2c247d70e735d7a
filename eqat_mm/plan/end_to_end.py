"""What E2E-QP and LLM-QAT have in common: the whole model in memory, trained by transformers' Trainer."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from eqat_mm.plan.amounts import Amount, Phase, amount, billions, largest, size
from eqat_mm.plan.costs import Costs, attention_flop, channels, in_flight, kept
from eqat_mm.plan.machine import Machine
from eqat_mm.plan.shape import ModelShape
from eqat_mm.plan.storage import checkpoint_bytes
from eqat_mm.quant.spec import QuantSpec
from eqat_mm.train.end_to_end import EndToEndConfig
from eqat_mm.train.recompute import FROM

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
        images: images of one, on average.
    """

    samples: int
    longest: int
    mean: float
    predicted: int
    images: float = 0


def text_work(samples: int, length: int) -> Work:
    """Windows of text: every token is predicted."""
    return Work(samples, length, length, length)


def image_text_work(shape: ModelShape, samples: int, longest: int) -> Work:
    """Conversations about one image each; what is not the image counts as predicted, at most."""
    longest = max(longest, shape.image_tokens + WORDS)
    return Work(samples, longest, shape.image_tokens + WORDS, longest - shape.image_tokens, int(shape.image_tokens > 0))


def mixed(first: Work, second: Work) -> Work:
    """Both kinds of samples together."""
    samples = first.samples + second.samples
    mean, images = (
        (first.samples * getattr(first, name) + second.samples * getattr(second, name)) / samples
        for name in ("mean", "images")
    )
    longest, predicted = max(first.longest, second.longest), max(first.predicted, second.predicted)
    return Work(samples, longest, mean, predicted, images)


class EndToEnd:
    """One training; each method is one formula."""

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
        wanted = config.gradient_checkpointing
        self.recomputes = machine.is_gpu and shape.parameters >= FROM if wanted == "auto" else wanted
        self.batch = config.batch_size * work.longest
        forward = config.batch_size * machine.gpus
        per_step = config.global_batch or forward * config.accumulation
        passes = math.ceil(work.samples * config.epochs / per_step)
        self.steps = passes if config.max_steps is None else config.max_steps
        self.visited = self.steps * per_step
        self.forwards = self.steps * math.ceil(per_step / forward)
        self.stage = _zero_stage(config.deepspeed)

    def phase(self, name: str) -> Phase:
        """Return the phase."""
        device = largest(self.before(), self.states() + largest(self.at_the_loss(), self.in_a_block()))
        process = amount(("process", self.machine.process, "Python, torch, transformers"))
        saving = ("saving", self.shape.stored * self.shape.unquantized, "what is not quantized, read again")
        host = process + amount(saving)
        gpu, ram = (device, host) if self.machine.is_gpu else (Amount(), host + device)
        return Phase(name, gpu, ram, self.disk(), self.written(), self.seconds(), self.machine.gpus)

    def before(self) -> Amount:
        """Memory of what is done before training, and gone then."""
        return Amount()

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

    def teaching(self) -> float:
        """FLOP per token of the teacher's forward."""
        return 2.0 * (self.shape.passed + self.shape.vocabulary * self.shape.hidden)

    def seconds(self) -> Amount:
        """Products, what is moved in memory, the vision tower and what is written."""
        tokens = self.work.mean * self.config.batch_size * self.forwards
        products, head = self.flop()
        passes = 4.5 if self.recomputes else 3.5
        attention = sum(attention_flop(self.shape, 1, round(self.work.mean)) for _ in self.shape.blocks) * passes
        channel = sum(channels(block, self.shape) for block in self.shape.blocks)
        logits = self.shape.vocabulary * self.work.predicted / self.work.longest
        moved = tokens * (self.costs.touched_end_to_end * channel + self.costs.touched_logit * logits)
        tower = 2 * (self.shape.rest - self.shape.projector) * self.shape.patches * self.work.images
        images = tower * self.config.batch_size * self.forwards
        flop = tokens * (products + head + attention + self.taught * self.teaching())
        written = self.written().total
        return amount(
            ("products", flop / self.machine.product, f"{flop / 1e15:.0f} PFLOP at the rate of dense ones"),
            ("memory", moved / self.machine.copy, f"{size(moved)} at {size(self.machine.copy)}/s"),
            ("vision tower", images / self.machine.product, f"{images / 1e15:.0f} PFLOP"),
            ("writing", written / self.machine.drive, f"{size(written)} at {size(self.machine.drive)}/s"),
        )


def _zero_stage(deepspeed: str | None) -> int:
    """Return the stage in the name of DeepSpeed's settings, 0 where there are none."""
    digits = [character for character in Path(deepspeed or "").stem if character.isdigit()]
    return int(digits[0]) if digits else 0
