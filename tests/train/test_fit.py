"""Fitting one block: steps, the best weights, and what happens when it goes wrong."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from eqat_mm.blocks.feed import PinnedFeed
from eqat_mm.blocks.walker import BlockStep, BlockWalker
from eqat_mm.errors import TrainingError
from eqat_mm.quant.fake_linear import FakeQuantLinear
from eqat_mm.quant.grid import SMALLEST_STEP
from eqat_mm.train import fit
from eqat_mm.train import report as report_of_block
from eqat_mm.train.fit import FitConfig, fit_block, split_samples
from eqat_mm.train.losses import BlockLoss, block_loss
from llava_adapters.llama import ARCH
from tests.blocks.test_feed import FakeLink
from tests.checkpoint.files import assert_four_lines
from tests.tiny_model import Tiny
from tests.tolerances import TOLERANCES
from tests.train.problems import CPU, LENGTH, SAMPLES, SPEC, loss_on, step_to_fit, values_of, walker_of

CONFIG = FitConfig(epochs=3, batch_size=2, lr_weight=5e-3, lr_scale=1e-3, validation_samples=3)
TRAINED, HELD_OUT = range(3, SAMPLES), range(3)
STEPS_PER_EPOCH = 5
CLOSE = TOLERANCES["block"][torch.float32]
Broken = Callable[[int], bool]


@contextmanager
def watched(look: Callable[[torch.optim.Optimizer], None]) -> Iterator[None]:
    """Call `look` before every optimizer step."""
    handle = register_optimizer_step_pre_hook(lambda optimizer, *_: look(optimizer))
    try:
        yield
    finally:
        handle.remove()


def breaking(monkeypatch: pytest.MonkeyPatch, broken: Broken, look: Callable[[int], None] = lambda call: None) -> None:
    """Make the training loss of some steps, counted from 0, not a number."""
    calls = 0

    def loss(output: Tensor, target: Tensor, kind: BlockLoss, **_: Any) -> Tensor:
        nonlocal calls
        if not torch.is_grad_enabled():
            return block_loss(output, target, kind)
        look(calls)
        calls += 1
        return block_loss(output, target, kind) * (math.nan if broken(calls - 1) else 1.0)

    monkeypatch.setattr(fit, "block_loss", loss)


def is_skipped(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the step that the optimizer is about to take will change nothing."""
    return bool(optimizer.found_inf)  # type: ignore[attr-defined]


def state_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Copies of all weights, moments and step counts."""
    weights = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    moments = [value for weight in weights for value in optimizer.state[weight].values()]
    return [value.detach().clone() for value in (*weights, *moments)]


def worse_after_the_first_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit, "cosine_factor", lambda step, *_, **__: 1.0 if step < STEPS_PER_EPOCH else 1e3)


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return all(torch.equal(left[name], right[name]) for name in left.keys() | right.keys())


# ---- training -------------------------------------------------------------------------------------


def test_training_lowers_the_validation_loss(walker: BlockWalker, step: BlockStep) -> None:
    before = loss_on(walker, step, HELD_OUT)
    report = fit_block(walker, step, CONFIG, seed=0)
    assert report.loss_before == pytest.approx(before, rel=CLOSE)
    assert report.loss_after == pytest.approx(loss_on(walker, step, HELD_OUT), rel=CLOSE)
    assert report.loss_after < 0.85 * report.loss_before
    assert report.loss_after == min(report.validation)


def test_the_report_counts_what_was_done(walker: BlockWalker, step: BlockStep) -> None:
    report = fit_block(walker, step, CONFIG, seed=0)
    assert report.steps == CONFIG.epochs * STEPS_PER_EPOCH
    assert report.tokens == CONFIG.epochs * len(TRAINED) * LENGTH
    assert len(report.validation) == len(report.training) == CONFIG.epochs
    assert (report.skipped, report.retries) == (0, 0)


def test_no_epochs_leave_the_block_as_it_was(walker: BlockWalker, step: BlockStep) -> None:
    before = values_of(step.block)
    report = fit_block(walker, step, FitConfig(epochs=0), seed=0)
    assert same(values_of(step.block), before)
    assert report.loss_after == report.loss_before


def test_everything_but_the_biases_is_trained(walker: BlockWalker, step: BlockStep) -> None:
    before = values_of(step.block)
    fit_block(walker, step, CONFIG, seed=0)
    after = values_of(step.block)
    assert {name for name in before if torch.equal(before[name], after[name])} == set()


def test_the_same_seed_gives_the_same_weights(tiny: Tiny) -> None:
    def fitted(seed: int) -> dict[str, Tensor]:
        walker = walker_of(tiny)
        step = step_to_fit(walker)
        fit_block(walker, step, CONFIG, seed=seed)
        return values_of(step.block)

    first = fitted(0)
    torch.manual_seed(99)
    assert same(fitted(0), first)
    assert not same(fitted(1), first)


@pytest.mark.slow
def test_a_compiled_block_learns_the_same(tiny: Tiny) -> None:
    counted: Any = torch._dynamo.utils.counters
    reports, graphs = [], []
    for compiled in (False, True):
        torch.compiler.reset()
        counted.clear()
        walker = walker_of(tiny)
        reports.append(fit_block(walker, step_to_fit(walker), replace(CONFIG, compile=compiled), seed=0))
        graphs.append(counted["stats"]["unique_graphs"])
    assert graphs[0] == 0
    assert graphs[1] > 0
    assert reports[1].loss_before == pytest.approx(reports[0].loss_before, rel=1e-4)
    assert reports[1].loss_after == pytest.approx(reports[0].loss_after, rel=1e-3)


def test_batches_from_pinned_memory_train_the_same(tiny: Tiny, walker: BlockWalker, step: BlockStep) -> None:
    fit_block(walker, step, CONFIG, seed=0)
    other = walker_of(tiny)
    other.feed = PinnedFeed(CPU, FakeLink())
    other_step = step_to_fit(other)
    fit_block(other, other_step, CONFIG, seed=0)
    assert same(values_of(other_step.block), values_of(step.block))


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_a_training_step_on_a_gpu_never_waits_for_it(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    walker = walker_of(tiny, torch.device("cuda"))
    step = step_to_fit(walker)
    fit_block(walker, step, CONFIG, seed=0)  # kernels are compiled and recorded calls are sent
    take = fit._BlockFit._step

    def strictly(*args: Any) -> Tensor:
        torch.cuda.set_sync_debug_mode("error")
        try:
            return take(*args)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(fit._BlockFit, "_step", strictly)
    report = fit_block(walker, step, CONFIG, seed=0)
    assert report.steps == CONFIG.epochs * STEPS_PER_EPOCH


# ---- the best weights -----------------------------------------------------------------------------


def test_the_best_weights_are_kept(walker: BlockWalker, step: BlockStep, monkeypatch: pytest.MonkeyPatch) -> None:
    worse_after_the_first_epoch(monkeypatch)
    report = fit_block(walker, step, CONFIG, seed=0)
    assert report.validation[0] < report.loss_before
    assert min(report.validation[1:]) > report.validation[0]
    assert report.loss_after == report.validation[0]
    assert loss_on(walker, step, HELD_OUT) == pytest.approx(report.validation[0], rel=CLOSE)


def test_the_initial_weights_are_kept_where_training_harms(walker: BlockWalker, step: BlockStep) -> None:
    before = values_of(step.block)
    report = fit_block(walker, step, FitConfig(epochs=2, lr_weight=10.0, validation_samples=3), seed=0)
    assert min(report.validation) > report.loss_before
    assert report.loss_after == report.loss_before
    assert same(values_of(step.block), before)


def test_the_best_weights_are_kept_in_place_and_without_gradients_beside_them(
    walker: BlockWalker, step: BlockStep, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[set[int]] = []
    keep = fit._BlockFit._keep

    def look(fitted: fit._BlockFit) -> None:
        assert all(parameter.grad is None for parameter in step.block.parameters())
        keep(fitted)
        kept.append({value.data_ptr() for value in fitted.best})

    falling = iter(range(100, 0, -1))
    monkeypatch.setattr(fit._BlockFit, "evaluate", lambda _: float(next(falling)))
    monkeypatch.setattr(fit._BlockFit, "_keep", look)
    fit_block(walker, step, CONFIG, seed=0)
    assert len(kept) == CONFIG.epochs
    assert kept[0] == kept[1] == kept[2]


@pytest.mark.parametrize(("patience", "epochs"), [(1, 2), (2, 5), (3, 6), (None, 8)])
def test_training_stops_when_patience_ends(
    walker: BlockWalker, step: BlockStep, monkeypatch: pytest.MonkeyPatch, patience: int | None, epochs: int
) -> None:
    losses = [10.0, 5.0, 6.0, 4.0, 4.0, 7.0, 8.0, 9.0, 9.0]  # before training, then after each epoch
    script = iter(losses)
    monkeypatch.setattr(fit._BlockFit, "evaluate", lambda _: next(script))
    report = fit_block(walker, step, FitConfig(epochs=8, validation_samples=3, patience=patience), seed=0)
    assert report.validation == losses[1 : epochs + 1]
    assert report.loss_after == min(report.validation)
    assert report.steps == epochs * STEPS_PER_EPOCH


def test_at_most_a_quarter_of_the_samples_is_held_out() -> None:
    assert split_samples(100, FitConfig(validation_samples=10)) == (range(10, 100), range(10))
    assert split_samples(12, FitConfig(validation_samples=64)) == (range(3, 12), range(3))
    assert split_samples(3, FitConfig(validation_samples=64)) == (range(3), range(0))


def test_without_held_out_samples_all_are_validated_on(walker: BlockWalker, step: BlockStep) -> None:
    report = fit_block(walker, step, FitConfig(epochs=1, validation_samples=0), seed=0)
    assert report.loss_after == pytest.approx(loss_on(walker, step, range(SAMPLES)), rel=CLOSE)


# ---- gradients and learning rates -----------------------------------------------------------------


@pytest.mark.parametrize("clip_norm", [1e-3, None])
def test_gradients_are_clipped(walker: BlockWalker, step: BlockStep, clip_norm: float | None) -> None:
    norms: list[float] = []

    def look(optimizer: torch.optim.Optimizer) -> None:
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"]]
        norms.append(math.sqrt(sum(gradient.square().sum().item() for gradient in gradients)))

    with watched(look):
        fit_block(walker, step, FitConfig(epochs=1, validation_samples=3, clip_norm=clip_norm), seed=0)
    assert len(norms) == STEPS_PER_EPOCH
    if clip_norm is None:
        assert min(norms) > 0.01
    else:
        assert norms == pytest.approx([clip_norm] * STEPS_PER_EPOCH, rel=1e-3)


def test_the_learning_rate_falls_along_the_schedule(walker: BlockWalker, step: BlockStep) -> None:
    rates: list[float] = []
    config = FitConfig(epochs=2, lr_weight=1e-3, lr_floor=0.1, warmup=0.2, validation_samples=3)
    with watched(lambda optimizer: rates.append(optimizer.param_groups[0]["lr"])):
        fit_block(walker, step, config, seed=0)
    assert rates[:3] == pytest.approx([1e-3 / 3, 2e-3 / 3, 1e-3])
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert 1e-4 < rates[-1] < 2e-4


# ---- non-finite losses ----------------------------------------------------------------------------


def test_steps_with_a_non_finite_loss_are_skipped_and_said(
    walker: BlockWalker, step: BlockStep, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    breaking(monkeypatch, lambda call: call in (1, 6, 7))
    report = fit_block(walker, step, CONFIG, seed=0)
    assert (report.skipped, report.retries) == (3, 0)
    assert "model.layers.0: 3 steps were skipped" in capsys.readouterr().out
    assert report.steps == CONFIG.epochs * STEPS_PER_EPOCH - 3
    assert all(math.isfinite(loss) for loss in (*report.training, *report.validation))
    assert all(parameter.isfinite().all() for parameter in step.block.parameters())
    assert report.loss_after < report.loss_before


@pytest.mark.parametrize("first", [0, 2])
def test_a_skipped_step_leaves_weights_moments_and_step_counts(
    walker: BlockWalker, step: BlockStep, monkeypatch: pytest.MonkeyPatch, first: int
) -> None:
    states: list[list[Tensor]] = []
    breaking(monkeypatch, lambda call: first <= call < first + 2)
    config = FitConfig(epochs=2, lr_weight=5e-3, lr_zero_point=0.1, weight_decay=0.1, validation_samples=3)
    with watched(lambda optimizer: states.append(state_of(optimizer))):
        fit_block(walker, step, config, seed=0)
    before, after, taken = states[first], states[first + 2], states[first + 3]
    if first == 0:  # moments are made by the first step, taken or not
        assert not any(value.any() for value in after[len(before) :])
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=first > 0))
    assert not all(torch.equal(a, b) for a, b in zip(after, taken, strict=True))


def test_skipped_steps_are_as_if_they_had_not_been(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the first batches are skipped, the others train as they would alone."""
    monkeypatch.setattr(fit, "cosine_factor", lambda *_, **__: 1.0)
    monkeypatch.setattr(fit._BlockFit, "_validate", lambda fitted: fitted._keep() is None)

    def fitted(batches: slice, broken: Broken) -> dict[str, Tensor]:
        with monkeypatch.context() as patch:
            breaking(patch, broken)
            epoch = fit._BlockFit._epoch
            patch.setattr(fit._BlockFit, "_epoch", lambda self, number: epoch(self, number)[batches])
            walker = walker_of(tiny)
            step = step_to_fit(walker)
            fit_block(walker, step, FitConfig(epochs=1, lr_weight=5e-3, validation_samples=3), seed=0)
        return values_of(step.block)

    assert same(fitted(slice(None), lambda call: call < 2), fitted(slice(2, None), lambda call: False))


@pytest.mark.parametrize("read_every", [1, 2, 16])
def test_losses_are_counted_whenever_they_are_read(
    walker: BlockWalker, step: BlockStep, monkeypatch: pytest.MonkeyPatch, read_every: int
) -> None:
    monkeypatch.setattr(report_of_block, "READ_EVERY", read_every)
    breaking(monkeypatch, lambda call: call in (0, 3, 9))
    report = fit_block(walker, step, FitConfig(epochs=2, validation_samples=1), seed=0)
    assert (report.skipped, report.steps) == (3, 9)
    # 11 samples in batches of 2: an epoch of 6 steps, whose short batch comes anywhere
    assert report.tokens in (9 * 2 * LENGTH - LENGTH, 9 * 2 * LENGTH - 2 * LENGTH, 9 * 2 * LENGTH)
    assert all(math.isfinite(loss) for loss in report.training)


def test_a_rollback_comes_when_losses_are_read(
    walker: BlockWalker, step: BlockStep, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three losses are not finite at once, the epoch has five steps: with its end comes the rollback."""
    at_start: dict[int, dict[str, Tensor]] = {}
    breaking(monkeypatch, lambda call: call < 3, lambda call: at_start.update({call: values_of(step.block)}))
    report = fit_block(walker, step, FitConfig(epochs=1, lr_weight=5e-3, validation_samples=3, max_skipped=1), seed=0)
    assert (report.skipped, report.retries) == (3, 1)
    assert len(at_start) == 2 * STEPS_PER_EPOCH
    assert not same(at_start[4], at_start[0])
    assert same(at_start[STEPS_PER_EPOCH], at_start[0])
    assert report.loss_after < report.loss_before


def test_gradients_that_are_never_finite_change_nothing_and_are_no_matter_of_the_rate(
    walker: BlockWalker, step: BlockStep, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loss(output: Tensor, target: Tensor, kind: BlockLoss, **_: Any) -> Tensor:
        if output.requires_grad:
            output.register_hook(lambda gradient: gradient * math.inf)
        return block_loss(output, target, kind)

    monkeypatch.setattr(fit, "block_loss", loss)
    before = values_of(step.block)
    with pytest.raises(
        TrainingError, match=f"{STEPS_PER_EPOCH} losses or gradients .* before the first step"
    ) as raised:
        fit_block(walker, step, FitConfig(epochs=1, validation_samples=3), seed=0)
    assert "from weights and streams that are finite" in raised.value.given
    assert same(values_of(step.block), before)


def test_too_many_skipped_steps_roll_the_block_back(
    walker: BlockWalker, step: BlockStep, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    at_start: dict[int, dict[str, Tensor]] = {}
    rates: list[float] = []
    monkeypatch.setattr(report_of_block, "READ_EVERY", 1)
    # first try: steps 0-2 are taken, 3 and 4 break it; second try: steps 5 and 6 break it; third try: nothing does
    breaking(
        monkeypatch, lambda call: call in (3, 4, 5, 6), lambda call: at_start.update({call: values_of(step.block)})
    )
    config = FitConfig(epochs=3, lr_weight=2e-3, lr_scale=1e-3, validation_samples=3, max_skipped=1)
    with watched(lambda optimizer: rates.extend([optimizer.param_groups[0]["lr"]] * (not is_skipped(optimizer)))):
        report = fit_block(walker, step, config, seed=0)
    assert (report.skipped, report.retries) == (4, 2)
    assert not same(at_start[3], at_start[0])
    assert same(at_start[5], at_start[0])
    assert same(at_start[7], at_start[0])
    assert rates[0] == 2e-3
    assert rates[3] == 2e-3 / 4
    assert report.loss_after < report.loss_before
    said = capsys.readouterr().out
    assert "model.layers.0: 2 non-finite losses; back to the best weights, lr x 0.5" in said
    assert "lr x 0.25" in said


def test_a_loss_that_stays_non_finite_is_an_error(
    walker: BlockWalker, step: BlockStep, monkeypatch: pytest.MonkeyPatch
) -> None:
    breaking(monkeypatch, lambda call: call >= 2)
    before = values_of(step.block)
    config = FitConfig(epochs=3, lr_weight=2e-3, lr_scale=1e-3, validation_samples=3, max_skipped=1, max_retries=2)
    with pytest.raises(TrainingError) as raised:
        fit_block(walker, step, config, seed=0)
    assert_four_lines(raised.value)
    assert raised.value.where == "model.layers.0, optimizer step 2"
    assert "lr_weight=0.0005, lr_scale=0.00025" in raised.value.given
    assert same(values_of(step.block), before)


def test_a_validation_loss_that_is_not_finite_is_said_and_does_not_count(
    walker: BlockWalker, step: BlockStep, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = iter([6.0, math.nan, 5.0, math.inf])
    monkeypatch.setattr(fit._BlockFit, "evaluate", lambda _: next(script))
    report = fit_block(walker, step, CONFIG, seed=0)
    assert (report.loss_after, report.validation) == (5.0, [None, 5.0, None])
    said = capsys.readouterr().out
    assert "model.layers.0: a validation loss of nan; the weights of this epoch do not count" in said
    json.dumps(asdict(report), allow_nan=False)


def test_the_grid_stays_one_that_can_be_stored(
    walker: BlockWalker, step: BlockStep, monkeypatch: pytest.MonkeyPatch
) -> None:
    falling = iter(range(100, 0, -1))
    monkeypatch.setattr(fit._BlockFit, "evaluate", lambda _: float(next(falling)))  # keep whatever comes out
    fit_block(walker, step, FitConfig(epochs=2, lr_weight=1e-2, lr_scale=0.5, lr_zero_point=5.0), seed=0)
    fakes = [step.block.get_submodule(path) for path in ARCH.linears]
    assert any((fake.scale == SMALLEST_STEP).any() for fake in fakes)  # type: ignore[union-attr]
    for fake in fakes:
        assert isinstance(fake, FakeQuantLinear)
        assert (fake.scale > 0).all()
        assert (fake.zero_point >= 0).all()
        assert (fake.zero_point <= SPEC.top).all()
