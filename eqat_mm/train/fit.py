"""Fitting one block: W, s, z and norms against the full-precision block's output (EfficientQAT, Block-AP)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from eqat_mm.blocks.parts import Portion
from eqat_mm.blocks.walker import BlockStep, BlockWalker
from eqat_mm.errors import ConfigError, TrainingError
from eqat_mm.quant.fake_linear import fake_quant_linears, project
from eqat_mm.runtime.progress import progress, say
from eqat_mm.runtime.seeding import derive_seed, generator
from eqat_mm.runtime.settings import Count, CountOrZero, Fraction, Positive, PositiveOrZero, Settings, Share
from eqat_mm.train.broken_block import broken_block, samples_that_are_not_finite
from eqat_mm.train.lanes import dealt
from eqat_mm.train.losses import BlockLoss, block_loss
from eqat_mm.train.report import Diverged, FitReport, Outcomes
from eqat_mm.train.schedule import cosine_factor


@dataclass(frozen=True)
class FitConfig(Settings, option="fit"):
    """How one block is trained. The defaults are the paper's, for models of 7B parameters and up.

    Attributes:
        loss: `mse` (paper), or `balanced` (see `train.losses`), which keeps a few tokens with very large activations
            from deciding alone.
        epochs: passes over the calibration samples; 0 leaves the block at its initialisation.
        batch_size: samples per step, of all processes together: their number changes nothing but the time. At least
            one for each process.
        lanes: samples are dealt to so many lanes, and every step takes as many from each. Set it to the number of
            processes, or a multiple, and each has an equal part of every step; at 1 the one with most samples of a
            step keeps the others waiting. It decides the order of samples; the number of processes does not.
        lr_weight: peak learning rate of W (paper: 2e-5 at 2 bits, 1e-5 at 3 and 4). What has a rate of 0
            is not trained, here and below.
        lr_scale: peak learning rate of the step sizes s.
        lr_zero_point: peak learning rate of the zero points z; null takes `lr_scale`.
        lr_norm: peak learning rate of the block's norms; null takes `lr_weight`.
        lr_floor: last learning rate as a fraction of the peak (cosine in between).
        warmup: fraction of the steps over which the learning rate rises.
        beta2: second-moment decay of AdamW.
        weight_decay: of AdamW, on W only.
        clip_norm: largest gradient norm; null does not clip.
        validation_samples: calibration samples kept out of training, for the validation loss.
        patience: stop after this many epochs without a better validation loss; null never stops.
        max_skipped: steps with a non-finite loss that are skipped before the block is rolled back.
        max_retries: rollbacks, each with half the learning rates, before training ends with an error.
        compile: run the block through torch.compile, which takes a C++ compiler on a CPU and a minute for the first
            block of each kind. Sums have another order then, so results differ in their last bits.
    """

    loss: BlockLoss = "mse"
    epochs: CountOrZero = 2
    batch_size: Count = 2
    lanes: Count = 1
    lr_weight: PositiveOrZero = 2e-5
    lr_scale: PositiveOrZero = 1e-4
    lr_zero_point: PositiveOrZero | None = None
    lr_norm: PositiveOrZero | None = None
    lr_floor: Fraction = 0.05
    warmup: Fraction = 0.0
    beta2: Share = 0.999
    weight_decay: PositiveOrZero = 0.0
    clip_norm: Positive | None = 1.0
    validation_samples: CountOrZero = 64
    patience: Count | None = None
    max_skipped: CountOrZero = 8
    max_retries: CountOrZero = 3
    compile: bool = False

    def check_together(self) -> None:
        """Check that something is trained."""
        rates = (self.lr_weight, self.lr_scale, self.lr_zero_point, self.lr_norm)
        if self.epochs and not any(rates):
            raise ConfigError(
                where="--fit.lr_weight, --fit.lr_scale, --fit.lr_zero_point, --fit.lr_norm",
                given="0: nothing would be trained",
                allowed="one of them above 0",
                do="raise one, or set --fit.epochs to 0 to leave blocks at their initialisation",
            )


def fit_block(walker: BlockWalker, step: BlockStep, config: FitConfig, *, seed: int) -> FitReport:
    """Train the fake-quantized block of `step` in place and keep its best weights by validation loss.

    The FP stream must stand at the block's output, the quantized stream at its input.

    A step whose loss or gradient is not finite is skipped; after `max_skipped` of them the block goes back to
    its best weights and continues with half the learning rates. Losses are looked at every
    `report.READ_EVERY` steps and at the end of an epoch, so that may come as many steps late. Where there was no step
    to blame, weights or samples are: that ends training at once.

    Several ranks take the steps of one: each its part of every batch, gradients summed. All come here at once, with the
    same block.

    Raises:
        TrainingError: not finite before the first step, or still after `max_retries` rollbacks.
    """
    fit = _BlockFit(walker, step, config, seed)
    for retry in range(config.max_retries + 1):
        factor = 0.5**retry
        try:
            fit.run(factor)
        except Diverged:
            fit.require_sound_block()
            fit.report.retries += 1
            fit.restore_best()
            say(f"{step.name}: {fit.report.skipped} non-finite losses; back to the best weights, lr x {factor / 2:g}")
        else:
            fit.restore_best()
            if fit.report.skipped:
                say(f"{step.name}: {fit.report.skipped} steps were skipped, their loss or gradient was not finite")
            return fit.report
    raise TrainingError(
        where=f"{step.name}, optimizer step {fit.report.steps}",
        given=f"a non-finite loss at lr_weight={config.lr_weight * factor:g}, lr_scale={config.lr_scale * factor:g}",
        allowed=f"a finite loss within {config.max_retries} retries",
        do="lower --fit.lr_weight and --fit.lr_scale, or train in float32 (--precision float32)",
    )


class _BlockFit:
    """State of one `fit_block`: the split of the samples, the best weights so far, the report."""

    def __init__(self, walker: BlockWalker, step: BlockStep, config: FitConfig, seed: int) -> None:
        self.walker = walker
        self.step = step
        self.config = config
        self.seed = derive_seed(seed, "block", step.index)
        self.ranks = walker.ranks
        self.training, self.validation = split_samples(len(step.sorts), config)
        self.parameters = trainable_parameters(step.block, config)
        self.linears = fake_quant_linears(step.block)
        self.block: Any = torch.compile(step.block) if config.compile else step.block
        before = self.evaluate()
        if not math.isfinite(before):
            raise broken_block(walker, step, f"a loss of {before} before the first step")
        self.report = FitReport(loss_before=before, loss_after=before)
        self.best = [parameter.detach().clone() for parameter in self._all()]
        self.looked = False

    def run(self, lr_factor: float) -> None:
        """Train all epochs with learning rates times `lr_factor`; raise `Diverged` if it cannot."""
        config = self.config
        # copies: the schedule writes its rates into the groups, and a retry starts from the peaks again
        groups = [dict(group) for group in self.parameters]
        optimizer = torch.optim.AdamW(groups, betas=(0.9, config.beta2), fused=True)
        peaks = [group["lr"] * lr_factor for group in optimizer.param_groups]
        self.report.learning_rate = config.lr_weight * lr_factor
        epochs = [self._epoch(epoch) for epoch in range(config.epochs)]
        total = sum(map(len, epochs))
        taken, stale = 0, 0
        outcomes = Outcomes(self.report, config.max_skipped)
        bar = progress(range(total), what=self.step.name, unit="step")
        for batches in epochs:
            for part, (hidden, target) in self._parts(batches):
                next(bar)
                factor = cosine_factor(taken, total, warmup=round(config.warmup * total), floor=config.lr_floor)
                for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                    group["lr"] = peak * factor
                taken += 1
                outcomes.add(self._step(optimizer, part, hidden, target), sum(part.tokens))
            self.report.training.append(outcomes.mean())
            if self.report.skipped:
                self.require_sound_block()
            stale = 0 if self._validate() else stale + 1
            if config.patience is not None and stale >= config.patience:
                return

    def require_sound_block(self) -> None:
        """Look for what is to blame for skipped steps, once: no step at all was taken, or samples are not finite."""
        seen = f"{self.report.skipped} losses or gradients that are not finite"
        if not self.report.steps:
            raise broken_block(self.walker, self.step, f"{seen} before the first step")
        if not self.looked and samples_that_are_not_finite(self.walker, self.step):
            raise broken_block(self.walker, self.step, seen)
        self.looked = True

    def restore_best(self) -> None:
        """Put the best weights back."""
        with torch.no_grad():
            for parameter, value in zip(self._all(), self.best, strict=True):
                parameter.copy_(value)

    @torch.no_grad()
    def evaluate(self) -> float:
        """Mean loss on the validation samples; on all samples where none are held out."""
        losses = []
        order = self.step.batches(self.validation or self.training, self.walker.batch_tokens)
        for part, (hidden, target) in self._parts(order):
            losses += [self._loss(part, hidden, target)] * len(part.batch)
        values: list[float] = self.ranks.sum_(torch.stack(losses)).tolist()
        return sum(values) / len(values)

    def _step(self, optimizer: torch.optim.Optimizer, part: Portion, hidden: Tensor, target: Tensor) -> Tensor:
        """One optimizer step; return its loss, NaN if that or a gradient was not finite and nothing was changed.

        Nothing here waits for the device.
        """
        loss = self._loss(part, hidden, target)
        if part.mine:
            loss.backward()
        loss = self._sum_gradients(loss.detach())
        limit = self.config.clip_norm if self.config.clip_norm is not None else math.inf
        norm = torch.nn.utils.clip_grad_norm_(self._all(), limit)
        finite = torch.isfinite(loss) & torch.isfinite(norm)
        # as torch.amp.GradScaler tells it: fused AdamW then leaves weights, moments and its step count alone
        optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)  # here, so that no gradients lie beside what validation needs
        project(self.linears)
        return loss.where(finite, math.nan)

    def _sum_gradients(self, loss: Tensor) -> Tensor:
        """Sum gradients and loss over the ranks, in one message; return the loss of the whole batch.

        What is not finite on one rank is not finite in the sum: all skip the same steps.
        """
        if self.ranks.world > 1:
            gradients = []
            for parameter in self._all():
                if parameter.grad is None:  # no sample of this batch is here
                    parameter.grad = torch.zeros_like(parameter)
                gradients.append(parameter.grad)
            self.ranks.sum_all_([*gradients, loss])
        return loss

    def _parts(self, order: Iterable[list[int]]) -> Iterator[tuple[Portion, tuple[Tensor, ...]]]:
        """Yield this rank's part of each batch with its inputs and targets."""
        return self.walker.parts(self.step, [self.step.quantized, self.step.fp], order)

    def _loss(self, part: Portion, hidden: Tensor, target: Tensor) -> Tensor:
        """Return what this rank adds to the mean loss of a batch."""
        kind = self.config.loss
        if self.ranks.world == 1:
            output = self.walker.run(self.block, self.step.call(part.mine), hidden)
            return block_loss(output, target, kind, weights_BT=self.step.weights_of(part.mine))
        if not part.mine:
            if kind == "balanced":
                part.joined(target)  # the others ask for the energies of all
            return torch.zeros((), device=self.walker.device)
        output = self.walker.run(self.block, self.step.call(part.mine), hidden)
        return block_loss(output, target, kind, part.joined, self.step.weights_of(part.mine)) * part.share

    def _validate(self) -> bool:
        loss = self.evaluate()
        finite = math.isfinite(loss)
        self.report.validation.append(loss if finite else None)
        if not finite:
            say(f"{self.step.name}: a validation loss of {loss}; the weights of this epoch do not count")
        better = finite and loss < self.report.loss_after
        if better:
            self.report.loss_after = loss
            self._keep()
        return better

    def _epoch(self, epoch: int) -> list[list[int]]:
        """Batches of one epoch: shuffled within each bucket of equal calls, then among one another."""
        batches = []
        for number, bucket in enumerate(self.step.buckets(self.training)):
            drawn = generator(derive_seed(self.seed, "bucket", number), "epoch order", epoch)
            visited = [bucket[i] for i in torch.randperm(len(bucket), generator=drawn).tolist()]
            batches += dealt(visited, self.config.batch_size, self.config.lanes)
        shuffled = torch.randperm(len(batches), generator=generator(self.seed, "batches", epoch))
        return [batches[i] for i in shuffled.tolist()]

    def _all(self) -> list[nn.Parameter]:
        return [parameter for group in self.parameters for parameter in group["params"]]

    @torch.no_grad()
    def _keep(self) -> None:
        """Make the present weights the best, in place: a second copy would raise the peak of memory."""
        for kept, parameter in zip(self.best, self._all(), strict=True):
            kept.copy_(parameter)


def split_samples(count: int, config: FitConfig) -> tuple[range, range]:
    """Return the indices of the samples to train on and of those held out; at most a quarter is held out."""
    held_out = min(config.validation_samples, count // 4)
    return range(held_out, count), range(held_out)


def trainable_parameters(block: nn.Module, config: FitConfig) -> list[dict[str, Any]]:
    """Return AdamW parameter groups of a fake-quantized block and make exactly these trainable.

    Each quantized linear names its own W, s and z; the block's norms are a group of their own. All else stays as it is:
    linears that are not quantized, biases, convolutions, what a module of several parts holds itself.
    """
    linears = fake_quant_linears(block)
    groups: list[tuple[list[nn.Parameter], float, float]] = [
        ([p for m in linears for p in m.weight_parameters()], config.lr_weight, config.weight_decay),
        ([p for m in linears for p in m.scale_parameters()], config.lr_scale, 0.0),
        (
            [p for m in linears for p in m.zero_point_parameters()],
            _or(config.lr_zero_point, config.lr_scale),
            0.0,
        ),
        ([p for norm in norms_of(block) for p in norm.parameters()], _or(config.lr_norm, config.lr_weight), 0.0),
    ]
    block.requires_grad_(False)
    trained = [(params, lr, decay) for params, lr, decay in groups if params and lr > 0]
    for params, _, _ in trained:
        for parameter in params:
            parameter.requires_grad_(True)
    return [{"params": params, "lr": lr, "weight_decay": decay} for params, lr, decay in trained]


def norms_of(block: nn.Module) -> list[nn.Module]:
    """Return the norms of a block: modules without parts whose parameters all have one dimension, a weight first."""
    leaves = (module for module in block.modules() if not list(module.children()))
    shapes = ((module, {name: parameter.dim() for name, parameter in module.named_parameters()}) for module in leaves)
    return [module for module, found in shapes if found.get("weight") == 1 and set(found.values()) == {1}]


def _or(value: float | None, default: float) -> float:
    return default if value is None else value
