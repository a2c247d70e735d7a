"""Block-AP over several ranks, here threads: weights, losses and streams are those of one process.

What is exact in one process is exact over ranks, too; between different numbers of ranks only sums have another order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from eqat_mm.blocks.arch import Inputs
from eqat_mm.blocks.source import OpenModel, open_model
from eqat_mm.blocks.walker import BlockStep, BlockWalker, capture_front
from eqat_mm.errors import ConfigError
from eqat_mm.runtime.ranks import ALONE, Ranks
from eqat_mm.train import block_ap, commit, fit, lanes
from eqat_mm.train.block_ap import BlockAPConfig, run_block_ap
from eqat_mm.train.fit import FitConfig, fit_block
from eqat_mm.train.losses import BlockLoss, block_loss
from eqat_mm.train.report import FitReport
from eqat_mm.train.stage_statistics import collect
from eqat_mm.train.warm_start import WarmStartConfig
from llava_adapters.llama import ARCH
from tests.checkpoint.files import assert_four_lines, same_weights
from tests.thread_ranks import in_threads
from tests.tiny_model import Tiny
from tests.tolerances import assert_close
from tests.train.problems import CPU, LENGTH, SPEC, batches_of
from tests.train.results import assert_same_result, records_of
from tests.train.stopping import Stopped

SAMPLES = 13
"""No number of ranks divides it."""

BLOCKS = 3
CONFIG = BlockAPConfig(
    SPEC,
    fit=FitConfig(epochs=2, batch_size=4, lr_weight=2e-4, lr_scale=5e-4, lr_norm=1e-4, validation_samples=3),
    precision="float32",
    batch_tokens=3 * LENGTH,
)
KEPT = [("ram", "recompute"), ("disk", "files")]

Streams = list[Tensor]


class Runs:
    """Runs of one problem in any number of ranks, and the quantized stream behind the first block of each."""

    def __init__(self, tiny: Tiny, batches: list[Inputs], monkeypatch: pytest.MonkeyPatch) -> None:
        self.tiny, self.batches, self.monkeypatch = tiny, batches, monkeypatch
        self.streams: dict[tuple[Path, int], Streams] = {}

    def __call__(self, folder: Path, world: int, config: BlockAPConfig = CONFIG) -> None:
        opened = [open_model(self.tiny.folder, ARCH) for _ in range(world)]  # one by one: it is not made for threads
        record = {"config": {"lr": config.fit.lr_weight}}

        def work(ranks: Ranks) -> None:
            run_block_ap(
                opened[ranks.rank],
                self.batches,
                config,
                folder,
                device=CPU,
                source="tiny",
                provenance=record,
                ranks=ranks,
            )

        with self.monkeypatch.context() as patch:
            patch.setattr(block_ap, "fit_block", self._looking(folder, block_ap.fit_block))
            work(ALONE) if world == 1 else in_threads(world, work)

    def stream(self, folder: Path, world: int) -> Tensor:
        """The stream at the input of block 1, samples in their order."""
        parts = [self.streams[folder, rank] for rank in range(world)]
        return torch.cat([parts[index % world][index // world].flatten(0, 1) for index in range(len(self.batches))])

    def _looking(self, folder: Path, wrapped: Callable[..., FitReport]) -> Callable[..., FitReport]:
        def look(walker: BlockWalker, step: BlockStep, *args: Any, **kwargs: Any) -> FitReport:
            if step.index == 1:
                held = range(len(step.quantized))
                self.streams[folder, walker.ranks.rank] = [step.quantized.read(index).clone() for index in held]
            return wrapped(walker, step, *args, **kwargs)

        return look


@pytest.fixture
def run(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> Runs:
    return Runs(tiny, batches_of(tiny, SAMPLES), monkeypatch)


# ---- the result of one process --------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["mse", "balanced"])
@pytest.mark.parametrize("world", [2, 3])
def test_ranks_train_as_one_process(run: Runs, tmp_path: Path, world: int, loss: BlockLoss) -> None:
    config = replace(CONFIG, fit=replace(CONFIG.fit, loss=loss))
    run(tmp_path / "alone", 1, config)
    run(tmp_path / "ranks", world, config)
    assert_same_result(tmp_path / "ranks", tmp_path / "alone")
    assert_close(run.stream(tmp_path / "ranks", world), run.stream(tmp_path / "alone", 1), "block")
    assert all(record["loss_after"] < record["loss_before"] for record in records_of(tmp_path / "ranks"))


@pytest.mark.parametrize("loss", ["mse", "balanced"])
def test_samples_of_several_lengths(tiny: Tiny, run: Runs, tmp_path: Path, loss: BlockLoss) -> None:
    """Buckets are those of all ranks; of some batches a rank has no sample at all."""
    lengths = (16, 12, 16, 16, 12, 16, 16, 16, 12, 16, 16, 9, 16)
    run.batches = [
        {"input_ids": batch["input_ids"][:, :length]} for batch, length in zip(run.batches, lengths, strict=True)
    ]
    config = replace(CONFIG, fit=replace(CONFIG.fit, loss=loss))
    run(tmp_path / "alone", 1, config)
    run(tmp_path / "ranks", 3, config)
    assert_same_result(tmp_path / "ranks", tmp_path / "alone")
    assert_close(run.stream(tmp_path / "ranks", 3), run.stream(tmp_path / "alone", 1), "block")


def test_padded_samples(run: Runs, tmp_path: Path) -> None:
    """Masks differ from sample to sample, and stay with it."""
    for index, batch in enumerate(run.batches):
        mask = torch.ones(1, LENGTH, dtype=torch.int64)
        mask[:, : index % 4] = 0
        batch["attention_mask"] = mask
    run(tmp_path / "alone", 1)
    run(tmp_path / "ranks", 2)
    assert_same_result(tmp_path / "ranks", tmp_path / "alone")


@torch.no_grad()
def sums_of(opened: OpenModel, batches: list[Inputs], ranks: Ranks, samples: range) -> list[Tensor]:
    """Statistics of every stage of a block, of two streams that differ."""
    held = [batches[index] for index in ranks.share(SAMPLES)]
    captured = capture_front(opened, held, torch.float32)
    walker = BlockWalker(opened, captured, device=CPU, batch_tokens=3 * LENGTH, ranks=ranks)
    step = next(walker.walk())
    for place, index in enumerate(ranks.share(SAMPLES)):
        noise = torch.randn(1, LENGTH, 64, generator=torch.Generator().manual_seed(index))
        step.quantized.write(place, step.quantized.read(place) + noise)
    rounds = opened.arch.rounds_of(step.block)
    found = [seen for each in rounds for seen in collect(walker, step, step.block, each, samples)]
    tokens = torch.tensor([float(each.tokens) for each in found])
    return [tokens, *(total for each in found for total in (each.hessian_II, each.lack))]


@pytest.mark.parametrize("samples", [range(3, SAMPLES), range(3, 5)], ids=["of all", "none of the third rank"])
def test_statistics_of_a_start_are_those_of_all_samples(tiny: Tiny, samples: range) -> None:
    batches, models = batches_of(tiny, SAMPLES), [open_model(tiny.folder, ARCH) for _ in range(4)]
    alone = sums_of(models[3], batches, ALONE, samples)
    for found in in_threads(3, lambda ranks: sums_of(models[ranks.rank], batches, ranks, samples)):
        for total, expected in zip(found, alone, strict=True):
            assert_close(total, expected, "gradient")


def test_all_ranks_skip_a_step_that_is_not_finite_on_one(
    run: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss of one sample is not a number, whoever holds it: every step with it is skipped, here one per epoch."""
    marked = run.batches[5]["input_ids"]
    spoiled: list[Tensor] = []

    def targets(walker: BlockWalker, step: BlockStep, *args: Any, **kwargs: Any) -> FitReport:
        if 5 % walker.ranks.world == walker.ranks.rank:
            spoiled.append(step.fp.read(5 // walker.ranks.world).clone())
        return fit_block(walker, step, *args, **kwargs)

    def loss(output: Tensor, target: Tensor, *args: Any, **more: Any) -> Tensor:
        bad = torch.is_grad_enabled() and any(torch.equal(row, spoiled[-1][0]) for row in target)
        return block_loss(output, target, *args, **more) * (torch.nan if bad else 1.0)

    assert marked.shape == (1, LENGTH)
    monkeypatch.setattr(block_ap, "fit_block", targets)
    monkeypatch.setattr(fit, "block_loss", loss)
    run(tmp_path / "alone", 1)
    run(tmp_path / "ranks", 2)
    assert [record["skipped"] for record in records_of(tmp_path / "ranks")] == [CONFIG.fit.epochs] * BLOCKS
    assert_same_result(tmp_path / "ranks", tmp_path / "alone")


# ---- lanes ----------------------------------------------------------------------------------------


def test_lanes_give_every_rank_an_equal_part_and_the_result_of_one_process(
    run: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(CONFIG, fit=replace(CONFIG.fit, lanes=2))
    drawn: list[list[int]] = []

    def watched(samples: Sequence[int], *args: int) -> list[list[int]]:
        batches = lanes.dealt(samples, *args)
        drawn.extend(batches)
        return batches

    monkeypatch.setattr(fit, "dealt", watched)
    run(tmp_path / "alone", 1, config)
    assert drawn
    assert all(sum(sample % 2 for sample in batch) == 2 for batch in drawn if len(batch) == 4)
    run(tmp_path / "ranks", 2, config)
    assert_same_result(tmp_path / "ranks", tmp_path / "alone")


def test_lanes_leave_no_sample_out() -> None:
    assert lanes.dealt([4, 0, 3, 1, 2], 2, 1) == [[4, 0], [3, 1], [2]]
    assert lanes.dealt([4, 0, 3, 1, 2], 2, 2) == [[4, 3], [0, 1], [2]]
    assert lanes.dealt([1, 3, 5], 4, 2) == [[1, 3], [5]]


# ---- stopped, and continued -----------------------------------------------------------------------


def stop_in_block(patch: pytest.MonkeyPatch, index: int) -> None:
    def fit_or_stop(walker: BlockWalker, step: BlockStep, *args: Any, **kwargs: Any) -> FitReport:
        if step.index == index:
            raise Stopped
        return fit_block(walker, step, *args, **kwargs)

    patch.setattr(block_ap, "fit_block", fit_or_stop)


@pytest.fixture
def stopped(run: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[int, BlockAPConfig], Path]:
    """Folder of a run of some ranks that was stopped in its last block."""

    def stop(world: int, config: BlockAPConfig) -> Path:
        with monkeypatch.context() as patch:
            stop_in_block(patch, BLOCKS - 1)
            with pytest.raises(Stopped):
                run(tmp_path / "stopped", world, config)
        assert len(records_of(tmp_path / "stopped")) == BLOCKS - 1
        return tmp_path / "stopped"

    return stop


@pytest.mark.parametrize("kept", KEPT)
def test_a_stopped_run_is_continued(run: Runs, stopped: Any, tmp_path: Path, kept: tuple[Any, Any]) -> None:
    config = replace(CONFIG, start=WarmStartConfig("refined"), spool=kept[0], commit=kept[1])
    run(tmp_path / "undisturbed", 2, config)
    folder = stopped(2, config)
    run(folder, 2, config)
    assert same_weights(folder / "model", tmp_path / "undisturbed" / "model")
    assert {path.name for path in folder.iterdir()} == {"model", "metrics.jsonl", "state.json"}


@pytest.mark.parametrize(
    ("before", "after", "kept"),
    [(2, 1, ("ram", "recompute")), (2, 1, ("disk", "files")), (1, 3, ("ram", "files")), (3, 2, ("disk", "recompute"))],
)
def test_another_number_of_ranks_continues_it(
    run: Runs, stopped: Any, tmp_path: Path, before: int, after: int, kept: tuple[Any, Any]
) -> None:
    config = replace(CONFIG, spool=kept[0], commit=kept[1])
    run(tmp_path / "alone", 1, config)
    folder = stopped(before, config)
    run(folder, after, config)
    assert_same_result(folder, tmp_path / "alone")
    assert {path.name for path in folder.iterdir()} == {"model", "metrics.jsonl", "state.json"}


def test_files_of_the_same_number_of_ranks_are_taken_up(
    run: Runs, stopped: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = replace(CONFIG, commit="files")
    folder = stopped(2, config)
    names = {str(path.relative_to(folder / "streams")) for path in (folder / "streams").rglob("*.bin")}
    assert names == {f"{part}-of-2/{name}-00002.bin" for part in (1, 2) for name in ("fp", "quantized")}
    monkeypatch.setattr(commit.RunState, "_recompute", None)
    run(folder, 2, config)
    assert "computed again" not in capsys.readouterr().out


def test_that_files_are_of_another_number_is_said(run: Runs, stopped: Any, capsys: pytest.CaptureFixture[str]) -> None:
    config = replace(CONFIG, commit="files")
    run(stopped(2, config), 1, config)
    assert "no whole streams of 1 process(es)" in capsys.readouterr().out


def test_a_missing_part_is_said_and_computed_again(
    run: Runs, stopped: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = replace(CONFIG, commit="files")
    folder = stopped(2, config)
    (folder / "streams" / "2-of-2" / "fp-00002.bin").unlink()
    run(folder, 2, config)
    assert "no whole streams of 2 process(es)" in capsys.readouterr().out
    run(tmp_path / "undisturbed", 2, config)
    assert same_weights(folder / "model", tmp_path / "undisturbed" / "model")


# ---- refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"batch_size": 2}, "--fit.batch_size"),
        ({"batch_size": 20}, "--calibration.count"),
        ({"lanes": 3}, "--fit.lanes"),
    ],
)
def test_too_many_ranks(run: Runs, tmp_path: Path, changes: dict[str, Any], where: str) -> None:
    config = replace(CONFIG, fit=replace(CONFIG.fit, **changes))
    run.batches = run.batches[: 2 if where == "--calibration.count" else None]
    with pytest.raises(ConfigError) as raised:
        run(tmp_path / "run", 3, config)
    assert_four_lines(raised.value)
    assert raised.value.where.startswith(where)
    assert not (tmp_path / "run").exists()
