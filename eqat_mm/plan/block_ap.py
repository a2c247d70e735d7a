"""Block-AP: one block in training memory, two activation streams beside it."""

from __future__ import annotations

import math

from eqat_mm.plan.amounts import Amount, Phase, amount, billions, largest, size
from eqat_mm.plan.costs import Costs, attention_flop, channels, costs_on, in_flight, kept
from eqat_mm.plan.end_to_end import Work
from eqat_mm.plan.machine import Machine
from eqat_mm.plan.shape import BlockShape, ModelShape
from eqat_mm.plan.storage import block_scales, checkpoint_bytes
from eqat_mm.train.block_ap import BlockAPConfig
from eqat_mm.train.fit import split_samples

PROCESSOR = 5e11
"""FLOP a second of the processor beside a GPU, where what comes before the blocks is computed."""


def plan_block_ap(
    shape: ModelShape, config: BlockAPConfig, work: Work, machine: Machine, costs: Costs | None = None
) -> Phase:
    """Return what Block-AP needs on samples of text, or on some about images."""
    run = _Run(shape, config, work, machine, costs or costs_on(machine))
    training = largest(run.training(), run.weighing())
    streams = Amount() if run.on_disk else run.streams(2)
    process = amount(("process", machine.process, "Python, torch, transformers"))
    if machine.is_gpu:
        gpu, ram = training, process + largest(run.capture(), streams)
    else:
        gpu, ram = Amount(), process + largest(run.capture(), streams + training)
    return Phase("Block-AP", gpu, ram, run.disk(), run.written(), run.seconds())


class _Run:
    """One Block-AP; each method is one formula."""

    def __init__(self, shape: ModelShape, config: BlockAPConfig, work: Work, machine: Machine, costs: Costs) -> None:
        self.shape, self.config, self.machine, self.costs, self.work = shape, config, machine, costs, work
        self.block, self.length = shape.largest, round(work.mean)
        self.tokens = round(work.samples * work.mean)
        self.batch = config.fit.batch_size * work.longest
        trained = len(split_samples(work.samples, config.fit)[0])
        self.steps = config.fit.epochs * math.ceil(trained / config.fit.batch_size)
        self.on_disk = config.spool == "disk"
        self.commits = config.commits_streams
        narrow = config.stream_dtype == "bfloat16" or (machine.is_gpu and config.stream_dtype != "float32")
        self.stream = self.tokens * shape.hidden * (2 if narrow else 4)
        self.precision = "autocast" if machine.precision == "bfloat16" else "float32"

    def trained(self, block: BlockShape) -> int:
        """Numbers trained in a block: W, s, z and norms."""
        grids = block_scales(block, self.config.quant) * (1 if self.config.quant.symmetric else 2)
        return block.weights + grids + block.other

    def training(self) -> Amount:
        """Memory in the backward of a step."""
        trained = self.trained(self.block)
        per_token = kept(self.block, self.shape, self.precision)
        per_token += in_flight(self.block, self.shape, 2 if self.precision == "autocast" else 4)
        return amount(
            self._states(trained),
            ("activations", self.batch * per_token, f"{per_token / 1e3:.0f} kB x {self.batch} tokens"),
        )

    def weighing(self) -> Amount:
        """Memory while gradients of the full-precision model say how much tokens count: all of it, and one sample."""
        if self.config.token_weights == "equal":
            return Amount()
        width = 2 if self.machine.is_gpu else 4
        per_token = len(self.shape.blocks) * kept(self.block, self.shape, "bfloat16" if width == 2 else "float32")
        return amount(
            ("full-precision model", width * self.shape.parameters, f"{width} B x {billions(self.shape.parameters)}"),
            ("activations", self.work.longest * per_token, f"{per_token / 1e3:.0f} kB x {self.work.longest} tokens"),
        )

    def _states(self, trained: int) -> tuple[str, float, str]:
        what = "W, s, z with gradients, AdamW and the best so far"
        return what, self.costs.fitted * trained, f"{self.costs.fitted:g} B x {billions(trained)}"

    def capture(self) -> Amount:
        """RAM while the first stream is filled: what stands before the blocks is there, too."""
        embedding = ("embedding", 4 * self.shape.embedding, "float32")
        tower = ("vision tower and projector", 4 * self.shape.rest * (self.work.images > 0), "float32")
        return amount(embedding, tower) + (Amount() if self.on_disk else self.streams(1))

    def streams(self, count: int) -> Amount:
        """Activation streams of all samples."""
        return amount(("streams", count * self.stream, f"{count} x {size(self.stream)}"))

    def disk(self) -> Amount:
        """Room for the checkpoint, and for the files of streams before and behind a block."""
        files = 4 if self.commits else 3 if self.on_disk else 0
        return self._checkpoint() + (self.streams(files) if files else Amount())

    def written(self) -> Amount:
        """The checkpoint, and each stream once per block where they are files."""
        passes = len(self.shape.blocks) + (1 if self.on_disk else 0)
        files = self.on_disk or self.commits
        return self._checkpoint() + (self.streams(2 * passes) if files else Amount())

    def _checkpoint(self) -> Amount:
        return amount(("checkpoint", checkpoint_bytes(self.shape, self.config.quant), self.config.quant.name))

    def seconds(self) -> Amount:
        """Steps, passes of the streams, and what is written."""
        step = sum(self._step(block) for block in self.shape.blocks)
        passes = sum(self._pass(block) for block in self.shape.blocks)
        written, blocks = self.written().total, len(self.shape.blocks)
        mean = f"{step / blocks * 1e3:.1f} ms"
        images = self.work.samples * self.work.images
        tower = 2 * self.shape.rest * self.shape.patches * images
        rate = PROCESSOR if self.machine.is_gpu else self.machine.product
        return amount(
            ("training", self.steps * step, f"{blocks} blocks x {self.steps} steps x {mean}"),
            ("passes of both streams", passes, f"{blocks} blocks x {passes / blocks:.0f} s"),
            ("writing", written / self.machine.drive, f"{size(written)} at {size(self.machine.drive)}/s"),
            ("vision tower", tower / rate, f"{images:.0f} images, on the processor"),
        )

    def _step(self, block: BlockShape) -> float:
        flop = 6 * block.passed * self.batch + 3.5 * attention_flop(self.shape, self.batch, self.length)
        moved = self.costs.fitted_traffic * self.trained(block)
        moved += self.costs.touched * channels(block, self.shape) * self.batch
        return flop / self.machine.product + moved / self.machine.copy + self.costs.host

    def _pass(self, block: BlockShape) -> float:
        flop = 2 * block.passed * self.tokens + attention_flop(self.shape, self.tokens, self.length)
        moved = self.costs.touched / 2 * channels(block, self.shape) * self.tokens
        copied = 2 * self.stream / self.machine.link
        return 2 * (flop / self.machine.product + moved / self.machine.copy + copied)
