"""The order of samples is a pure function of (seed, epoch)."""

from __future__ import annotations

import pytest
import torch

from eqat_mm.data.order import EpochOrder
from eqat_mm.errors import ConfigError


def _flat(order: EpochOrder, epoch: int) -> torch.Tensor:
    return torch.cat(order.batches(epoch))


@pytest.mark.parametrize(("size", "batch"), [(1, 1), (7, 3), (8, 4), (3, 5)])
def test_every_sample_comes_once_in_an_epoch(size: int, batch: int) -> None:
    order = EpochOrder(size, batch, seed=0)
    batches = order.batches(4)
    assert len(batches) == order.steps_per_epoch
    assert all(len(indices) == batch for indices in batches[:-1])
    assert torch.equal(torch.cat(batches).sort().values, torch.arange(size))


def test_drop_last_leaves_only_full_batches() -> None:
    order = EpochOrder(7, 3, seed=0, drop_last=True)
    assert [len(indices) for indices in order.batches(0)] == [3, 3]
    assert order.steps_per_epoch == 2


def test_epochs_and_seeds_differ_and_repeat() -> None:
    order = EpochOrder(50, 8, seed=1)
    assert torch.equal(_flat(order, 3), _flat(EpochOrder(50, 8, seed=1), 3))
    assert not torch.equal(_flat(order, 3), _flat(order, 2))
    assert not torch.equal(_flat(order, 3), _flat(EpochOrder(50, 8, seed=2), 3))


def test_the_order_does_not_depend_on_the_batch_size() -> None:
    assert torch.equal(_flat(EpochOrder(50, 8, seed=1), 0), _flat(EpochOrder(50, 5, seed=1), 0))


def test_global_randomness_is_neither_used_nor_touched() -> None:
    before = torch.random.get_rng_state()
    EpochOrder(50, 8, seed=1).batches(0)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("done", range(13))
def test_resuming_after_any_step_gives_the_rest_of_the_run(done: int, drop_last: bool) -> None:
    order = EpochOrder(10, 3, seed=5, drop_last=drop_last)
    whole, rest = list(order.steps(3)), list(order.steps(3, done))
    assert [(epoch, step) for epoch, step, _ in rest] == [(epoch, step) for epoch, step, _ in whole[done:]]
    assert all(torch.equal(a[2], b[2]) for a, b in zip(rest, whole[done:], strict=True))


@pytest.mark.parametrize(
    ("size", "batch", "drop_last", "where"),
    [(0, 1, False, "EpochOrder.size"), (1, 0, False, "EpochOrder.batch"), (3, 4, True, "EpochOrder.batch")],
)
def test_impossible_sizes_are_refused(size: int, batch: int, drop_last: bool, where: str) -> None:
    with pytest.raises(ConfigError) as caught:
        EpochOrder(size, batch, seed=0, drop_last=drop_last)
    assert caught.value.where == where


def test_negative_progress_is_refused() -> None:
    with pytest.raises(ConfigError, match="0 or more"):
        next(EpochOrder(3, 1, seed=0).steps(1, done=-1))
