"""From Block-AP's data settings to what its trainer takes: windows of text, or conversations and windows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor

from eqat_mm.blocks.arch import Inputs
from eqat_mm.blocks.source import OpenModel
from eqat_mm.checkpoint.folders import load_for_inference, load_tokenizer
from eqat_mm.checkpoint.speaker import load_listener, style_digest
from eqat_mm.commands.plumbing.instructions import require_instructions
from eqat_mm.commands.plumbing.samples import problems_of
from eqat_mm.data.image_text.batching import Collator
from eqat_mm.data.image_text.calibration import CalibrationSamples
from eqat_mm.data.image_text.preparing import TOO_FEW
from eqat_mm.data.image_text.samples import ImageTextDataset, image_text_data
from eqat_mm.data.image_text.settings import Conversations
from eqat_mm.data.text.settings import TextWindows
from eqat_mm.data.text.windows import digest_of, text_windows
from eqat_mm.errors import ConfigError, DataError
from eqat_mm.plan.end_to_end import Work, image_text_work, mixed, text_work
from eqat_mm.plan.shape import ModelShape
from eqat_mm.runtime.memory import release_freed_memory
from eqat_mm.runtime.precision import Decided, frozen_dtype, resolve
from eqat_mm.runtime.progress import progress, say
from eqat_mm.runtime.ranks import Ranks
from eqat_mm.runtime.sealed import read_sealed, write_sealed
from eqat_mm.runtime.settings import Within
from eqat_mm.train.block_ap import BlockAPConfig
from eqat_mm.train.modalities import TEXT, VISUAL, Modalities, equal_weights, gradient_weights

ImageShare = Annotated[float, Within(0, 1, without=(0,))]

WEIGHTS = "token_weights.json"
"""File in the run folder: how much the tokens of images count in each block, those of text 1."""

_WEIGHED = 64
"""Conversations about images whose gradients say how much tokens count; both kinds are compared in the same ones."""


@dataclass(frozen=True)
class Calibration:
    """What blocks are fitted on.

    Attributes:
        batches: model inputs, one sample each, read when they are asked for.
        work: their number and length.
        digest: a hash by which changed data is noticed.
        samples: the same, with labels; None for text alone.
        visual: tokens that stand for images; None for text alone.
    """

    batches: Sequence[Inputs]
    work: Work
    digest: str
    samples: CalibrationSamples | None = None
    visual: Tensor | None = None


def calibration_of(
    folder: Path, text: TextWindows, conversations: Conversations | None, image_share: float, output: Path
) -> Calibration:
    """Return what the blocks of the model in `folder` are fitted on.

    Args:
        folder: of the model.
        text: windows; its count is that of all samples.
        conversations: that some of the samples are taken from.
        image_share: their share.
        output: folder of the run, beside which bad samples are listed.

    Raises:
        EqatError: unreadable data or tokenizer, bad samples, too little of either, or no processor.
    """
    if conversations is None:
        windows = text_windows(load_tokenizer(folder), text)
        batches = [{"input_ids": window.unsqueeze(0)} for window in windows]
        return Calibration(batches, text_work(*windows.shape), digest_of(windows))
    require_instructions(conversations)
    count = images_among(text, image_share)
    processor = load_listener(folder, conversations.style)
    data = _talks(processor, conversations, count, problems_of(output))
    windows = _windows(folder, text, _total(text) - count)
    samples = CalibrationSamples(data, windows, Collator(processor.tokenizer), conversations.seed)
    seen = len(data) - sum(data.text_only)
    say(f"{len(data):,} conversations, {seen:,} about images, and {len(windows):,} windows of text")
    digest = f"{data.digest()} {style_digest(processor)} {digest_of(windows)}"
    return Calibration(samples, _work(samples, seen), digest, samples, data.visual)


def _talks(processor: Any, conversations: Conversations, count: int, problems: Path) -> ImageTextDataset:
    """Return so many conversations."""
    try:
        return image_text_data(processor, conversations.drawn(count), problems)
    except DataError as error:
        if TOO_FEW not in error.allowed:
            raise
        raise DataError(
            where=error.where,
            given=error.given,
            allowed=f"{count:,} or more: --image_share of --calibration.count",
            do="give more conversations, or lower --image_share or --calibration.count",
        ) from error


def _windows(folder: Path, text: TextWindows, count: int) -> Tensor:
    """Return so many windows of text, int64 [count, T]; without any the text is not read."""
    if count == 0:
        return torch.empty(0, text.length, dtype=torch.int64)
    return text_windows(load_tokenizer(folder), replace(text, count=count))


def _work(samples: CalibrationSamples, seen: int) -> Work:
    longest, count = max(samples.lengths), len(samples)
    return Work(count, longest, sum(samples.lengths) / count, longest, seen / count)


def images_among(text: TextWindows, image_share: float) -> int:
    """Return how many of the samples are conversations, one at least.

    Raises:
        ConfigError: it is not said how many samples there are.
    """
    return max(1, round(_total(text) * image_share))


def _total(text: TextWindows) -> int:
    if text.count is None:
        raise ConfigError(
            where="--calibration.count",
            given="null, all the text, beside conversations",
            allowed="the number of all samples, of which --image_share are conversations",
            do="give one, --calibration.count 512",
        )
    return text.count


def planned_work(shape: ModelShape, text: TextWindows, conversations: Conversations | None, image_share: float) -> Work:
    """Return what Block-AP has to do, as far as settings say it."""
    total = text.count or 4096
    if conversations is None:
        return text_work(total, text.length)
    count = images_among(replace(text, count=total), image_share)
    about_images = image_text_work(shape, count, conversations.max_length)
    return about_images if count == total else mixed(about_images, text_work(total - count, text.length))


def modalities_of(
    opened: OpenModel,
    calibration: Calibration,
    config: BlockAPConfig,
    folder: Path,
    device: torch.device,
    ranks: Ranks,
) -> Modalities | None:
    """Return how much tokens count; what gradients said once, in this run, stays so.

    Raises:
        CheckpointError: the file of an earlier start was altered.
    """
    if calibration.visual is None:
        return None
    blocks = len(opened.blocks)
    if config.token_weights == "equal":
        return Modalities(calibration.visual, equal_weights(blocks))
    file = folder / WEIGHTS
    known = ranks.from_first(lambda: read_sealed(file, "of_kind")["of_kind"] if file.is_file() else None)
    if known is None:
        found = _by_gradient(opened, calibration, device, ranks, resolve(config.precision, device))
        known = found.tolist()
        if ranks.rank == 0:
            write_sealed(file, {"of_kind": known})
        release_freed_memory()
    of_kind = torch.tensor(known)
    ratios = of_kind[:, VISUAL] / of_kind[:, TEXT]
    say(f"a token of an image counts {ratios.min():.2g} to {ratios.max():.2g} times as much as one of text")
    return Modalities(calibration.visual, of_kind)


def _by_gradient(
    opened: OpenModel, calibration: Calibration, device: torch.device, ranks: Ranks, precision: Decided
) -> Tensor:
    assert calibration.samples is not None
    assert calibration.visual is not None
    chosen = calibration.samples.with_images(_WEIGHED)
    if not chosen:
        return equal_weights(len(opened.blocks))
    model: Any = load_for_inference(opened.folder, device, frozen_dtype(precision, device))
    mine = [chosen[index] for index in ranks.share(len(chosen))]
    read = map(calibration.samples.labelled, mine)
    samples = progress(read, what="weights of tokens", total=len(mine), unit="sample")
    return gradient_weights(model, opened.arch.find_blocks(model), samples, calibration.visual, precision, ranks)
