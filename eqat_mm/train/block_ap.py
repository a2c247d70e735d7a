"""Block-AP (EfficientQAT): for block in walker: prepare, train, pack, commit.

A committed block is the unit of resume (`train.commit`). On a CPU a run that is killed and started again gives the same
weights as one that is not.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from eqat_mm.blocks.arch import Inputs, set_submodule
from eqat_mm.blocks.experts import SplitExperts
from eqat_mm.blocks.source import OpenModel
from eqat_mm.blocks.walker import BlockStep, BlockWalker, capture_front
from eqat_mm.checkpoint.manifest import Manifest, read_manifest
from eqat_mm.checkpoint.write import CheckpointWriter
from eqat_mm.data.image_text.style import Style
from eqat_mm.quant.convert import to_fake, to_packed
from eqat_mm.quant.fake_linear import FakeQuantLinear
from eqat_mm.quant.spec import QuantSpec
from eqat_mm.runtime.memory import peak_bytes, release_freed_memory
from eqat_mm.runtime.precision import Precision, resolve
from eqat_mm.runtime.progress import pace, place, progress, say
from eqat_mm.runtime.ranks import ALONE, Ranks
from eqat_mm.runtime.reporting import SILENT, Reporter, ReportTo
from eqat_mm.runtime.room import require_disk, require_memory
from eqat_mm.runtime.settings import Count, Seed, Settings
from eqat_mm.train.broken_block import require_finite_targets
from eqat_mm.train.commit import RunState
from eqat_mm.train.fit import FitConfig, fit_block, norms_of, split_samples
from eqat_mm.train.lanes import require_lanes, say_if_unequal
from eqat_mm.train.modalities import Modalities, Weights
from eqat_mm.train.report import FitReport
from eqat_mm.train.units import check_allocation
from eqat_mm.train.warm_start import WarmStartConfig, initial_grids

STAGE = "block-ap"


@dataclass(frozen=True)
class BlockAPConfig(Settings):
    """Block-AP without the model and the data.

    Attributes:
        quant: bits, group size, symmetry.
        start: where the grids start.
        fit: how each block is trained.
        spool: keep the activation streams in RAM or in memory-mapped files; `auto` takes RAM where `eqat plan` says
            that they fit there.
        stream_dtype: of the activation streams; `auto` takes bfloat16 on a GPU and float32 on a CPU.
        commit: how a killed run gets its streams back. `files`: each block leaves both on the disk. `recompute`: the
            tokens pass the finished blocks again, nothing is written. `auto` takes `files` where `spool` is `disk`.
        precision: of matrix products; `auto` takes bfloat16 where it is faster (see `runtime.precision`).
        batch_tokens: tokens per forward where nothing is trained.
        token_weights: how much the tokens of images count beside those of text, where there are both: `equal`, or
            `gradient`, by what their errors cost the full-precision model in each block (needs it whole in memory).
        report_to: dashboard that is given the numbers of each block; `none`, `tensorboard` or `wandb`, which must be
            installed.
        seed: of the order of samples.
    """

    quant: QuantSpec = field(default_factory=QuantSpec)
    start: WarmStartConfig = field(default_factory=WarmStartConfig)
    fit: FitConfig = field(default_factory=FitConfig)
    spool: Literal["auto", "ram", "disk"] = "auto"
    stream_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    commit: Literal["auto", "recompute", "files"] = "auto"
    precision: Precision = "auto"
    batch_tokens: Count = 4096
    token_weights: Weights = "equal"
    report_to: ReportTo = "none"
    seed: Seed = 0

    @property
    def commits_streams(self) -> bool:
        """Whether a commit holds both streams."""
        return self.commit == "files" or (self.commit == "auto" and self.spool == "disk")

    def stream_dtype_on(self, device: torch.device) -> torch.dtype:
        """Return the dtype of the streams, `auto` decided."""
        name = self.stream_dtype
        if name == "auto":
            name = "bfloat16" if device.type == "cuda" else "float32"
        dtype: torch.dtype = getattr(torch, name)
        return dtype


def run_block_ap(
    opened: OpenModel,
    batches: Sequence[Inputs],
    config: BlockAPConfig,
    folder: Path,
    *,
    device: torch.device,
    source: str,
    provenance: dict[str, Any],
    modalities: Modalities | None = None,
    style: Style | None = None,
    ranks: Ranks = ALONE,
    reporter: Reporter = SILENT,
) -> Manifest:
    """Quantize every block of `opened` and write the checkpoint to `folder/model`.

    Bad input is found before anything is written. Of several ranks each captures, holds and advances its share of the
    samples; all train the same block, and the first writes.

    Args:
        opened: the full-precision model.
        batches: model inputs, one calibration sample each; each is asked for once, when it is captured.
        config: settings.
        folder: run folder; what is committed there is taken for this run's. All ranks see the same one.
        device: where blocks are trained.
        source: name of the model, for the manifest.
        provenance: record of the run, for the manifest.
        modalities: how much tokens count; None where there are no images and no filling: all count alike.
        style: how the model was addressed in its samples, which the checkpoint keeps; None takes that of the model.
        ranks: processes that share the work; the result does not depend on their number, but for rounding.
        reporter: takes the numbers of each block.

    Raises:
        ConfigError: the group size does not divide a layer, or there are more ranks than samples of a batch or of the
            calibration.
        CheckpointError: the progress in the folder is damaged.
        TrainingError: a block that is not finite before it is trained, or whose loss stays so.
    """
    check_groups(opened, config.quant)
    require_lanes(config.fit.batch_size, config.fit.lanes, len(batches), ranks.world)
    say_if_unequal(config.fit.lanes, ranks.world)
    say_what_is_kept(opened)
    say_who_reads(opened, config.quant)
    writer = CheckpointWriter(folder / "model", opened, config.quant)
    state = RunState(folder, writer, keeps_streams=config.commits_streams, ranks=ranks)
    share = ranks.share(len(batches))
    mine: Iterable[Inputs] = (batches[index] for index in share)
    if modalities is not None:
        mine = modalities.noting(mine)
    captured = capture_front(opened, progress(mine, what="capture", total=len(share), unit="sample"), torch.float32)
    walker = BlockWalker(
        opened,
        captured,
        device=device,
        precision=resolve(config.precision, device),
        stream_dtype=config.stream_dtype_on(device),
        spool=state.streams if config.spool == "disk" else None,
        keep_passed=state.keeps_streams,
        batch_tokens=config.batch_tokens,
        ranks=ranks,
        weights=None if modalities is None else modalities.at,
    )
    state.restore(walker)
    reporter.begin(state.done)
    release_freed_memory()
    console = _Console(len(walker), state.done, device)
    for step in walker.walk(state.done):
        report, target_square = quantize_block(walker, step, config)
        shard = writer.write_block(step.index, step.block) if ranks.rank == 0 else ""
        record = console.record(step, report, target_square)
        state.commit(walker, record, shard)
        reporter.add(step.index + 1, record)
    release_freed_memory()
    if ranks.rank == 0:
        writer.finish(STAGE, source, provenance, style=style, digests=state.digests)
    ranks.barrier()
    state.clean()
    return read_manifest(folder / "model")


def quantize_block(walker: BlockWalker, step: BlockStep, config: BlockAPConfig) -> tuple[FitReport, float]:
    """Turn the full-precision block of `step` into a trained and packed one and pass both streams through it.

    Returns:
        What happened, and the mean square of the targets.
    """
    arch = walker.opened.arch
    training, _ = split_samples(len(step.sorts), config.fit)
    grids = initial_grids(walker, step, config.quant, config.start, training)
    target_square = walker.advance_fp(step)
    require_finite_targets(walker, step, target_square)
    for path, linear in arch.named_linears(step.block):
        set_submodule(step.block, path, to_fake(linear, grids.pop(path), config.quant.of(f"{step.name}.{path}")))
    release_freed_memory()
    walker.ranks.agree_(list(step.block.parameters()))
    report = fit_block(walker, step, config.fit, seed=config.seed)
    walker.ranks.agree_(list(step.block.parameters()))
    for path in arch.linears_of(step.block):
        fake = step.block.get_submodule(path)
        assert isinstance(fake, FakeQuantLinear)
        set_submodule(step.block, path, to_packed(fake))
    step.block.requires_grad_(False)
    _round_as_stored(walker, step)
    walker.advance_quantized(step)
    return report, target_square


@torch.no_grad()
def _round_as_stored(walker: BlockWalker, step: BlockStep) -> None:
    """Round trained norms to the dtype they are stored in, so that the quantized stream is that of the checkpoint."""
    source = walker.opened.source
    for name, parameter in step.block.named_parameters():
        if f"{step.name}.{name}" in source:
            parameter.copy_(parameter.to(source.read(f"{step.name}.{name}").dtype))


def kept_parameters(opened: OpenModel) -> list[str]:
    """Return the parameters of blocks that are neither of a quantized linear nor of a norm, each path once."""
    found: dict[str, None] = {}
    for block in opened.blocks:
        changing = [linear for _, linear in opened.arch.named_linears(block)] + norms_of(block)
        known = {id(parameter) for module in changing for parameter in module.parameters()}
        found |= dict.fromkeys(name for name, parameter in block.named_parameters() if id(parameter) not in known)
    return list(found)


def say_what_is_kept(opened: OpenModel) -> None:
    """Say which parameters of the blocks Block-AP leaves as they are."""
    names = kept_parameters(opened)
    if names:
        shown = ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
        say(f"note: neither quantized nor trained in the blocks: {shown}")


def say_who_reads(opened: OpenModel, spec: QuantSpec) -> None:
    """Say which checkpoint others do not read."""
    if not spec.symmetric and any(isinstance(module, SplitExperts) for module in opened.model.modules()):
        say("note: transformers and vLLM read quantized experts on the symmetric grid only: --quant.symmetric true")
    if not spec.symmetric and spec.table:
        say("note: transformers reads bits that differ on the symmetric grid only: --quant.symmetric true")


def check_groups(opened: OpenModel, spec: QuantSpec) -> None:
    """Check that the group size divides every quantized linear, and that an allocation is of this model.

    Raises:
        ConfigError: names the first layer where it does not, or is not.
    """
    check_allocation(opened, spec)
    for index, block in enumerate(opened.blocks):
        for path, linear in opened.arch.named_linears(block):
            spec.group_of(linear.in_features, f"{opened.block_name(index)}.{path}")


def check_room(
    opened: OpenModel,
    tokens: int,
    config: BlockAPConfig,
    folder: Path,
    device: torch.device,
    ranks: Ranks = ALONE,
    written: int = 0,
) -> None:
    """Check that there is room for the streams, where they are kept and committed, and for the checkpoint.

    The streams are of so many tokens. The disk holds those of all ranks, memory those of the ranks of this machine.
    `written` bytes of that are on the disk already.

    Raises:
        ResourceError: not enough memory, or not enough disk.
    """
    hidden = opened.model.config.get_text_config().hidden_size  # type: ignore[union-attr, operator]
    stream: int = tokens * hidden * config.stream_dtype_on(device).itemsize
    weights = sum(parameter.numel() for parameter in opened.model.parameters())
    if config.spool != "disk":
        require_memory(2 * stream * ranks.local // ranks.world, "activation streams")
    require_disk(folder, streams_on_disk(config) * stream + weights * 2, "activation streams and checkpoint", written)


def streams_on_disk(config: BlockAPConfig) -> int:
    """Return how many streams are on the disk at the worst moment.

    With `files` two at a block's input, which the last commit needs, and two behind it; without, one is being written
    while both are there.
    """
    if config.commits_streams:
        return 4
    return 3 if config.spool == "disk" else 0


class _Console:
    """One line per block, and the same as a record for metrics.jsonl."""

    def __init__(self, total: int, done: int, device: torch.device) -> None:
        self.total, self.first, self.device = total, done, device
        self.started = self.last = time.monotonic()

    def record(self, step: BlockStep, report: FitReport, target_square: float) -> dict[str, Any]:
        now = time.monotonic()
        seconds, self.last = now - self.last, now
        relative, finished = report.relative_error(target_square), step.index + 1
        record = {
            "block": step.index,
            "name": step.name,
            **asdict(report),
            "relative_error": relative,
            "tokens_per_second": report.tokens / seconds,
            "peak_bytes": peak_bytes(self.device),
            "seconds": seconds,
            "eta_seconds": (now - self.started) / (finished - self.first) * (self.total - finished),
        }
        say(
            f"{place('block', finished, self.total)}  {report.steps} steps"
            f"  loss {report.loss_before:.4g} -> {report.loss_after:.4g}"
            f"  relative error {'-' if relative is None else f'{relative:.3f}'}  {pace(record)}"
        )
        return record
