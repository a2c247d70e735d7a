"""From a job's data settings to what a trainer takes: text windows, or conversations about images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import transformers
from torch.utils.data import Dataset

from eqat_mm.checkpoint.folders import load_tokenizer
from eqat_mm.checkpoint.speaker import load_speaker, style_digest
from eqat_mm.data.batching import Collator, SampleOrder
from eqat_mm.data.held_out import divided
from eqat_mm.data.image_text import ImageTextData, image_text_data
from eqat_mm.data.kept import Kept
from eqat_mm.data.text_settings import TextWindows
from eqat_mm.data.windows import digest_of, text_windows
from eqat_mm.train.end_to_end import Sample, WindowDataset


@dataclass(frozen=True)
class Samples:
    """Training data of an end-to-end trainer.

    Attributes:
        dataset: the samples.
        collator: makes a batch of them; None stacks them.
        order: in which they come; None shuffles them.
        digest: a hash by which changed data is noticed.
        without_images: number of samples that have no image; 0 where none are to have any.
        held_out: samples to judge the model by; None where there are none.
        keep: writes into the folder of a run what it needs to find its samples again where the data change.
    """

    dataset: Dataset[Sample]
    collator: transformers.DataCollator | None
    order: SampleOrder | None
    digest: str
    without_images: int = 0
    held_out: Dataset[Sample] | None = None
    keep: Callable[[Path], None] = lambda folder: None


def text_samples(folder: Path, config: TextWindows) -> Samples:
    """Return windows of text in the tokens of the model in `folder`.

    Raises:
        EqatError: unreadable text or tokenizer, or too little text.
    """
    windows = text_windows(load_tokenizer(folder), config)
    return Samples(WindowDataset(windows), None, None, digest_of(windows))


def problems_of(output: Path) -> Path:
    """Return the file beside a run folder in which the run's bad samples are listed."""
    return output.with_name(f"{output.name}.problems.jsonl")


def image_text_samples(
    folder: Path, config: ImageTextData, step: int, problems: Path, before: Kept | None = None
) -> Samples:
    """Return checked conversations, with the processor of the model in `folder`.

    Args:
        folder: of the model.
        config: which conversations.
        step: samples in one optimizer step, over all processes and accumulated forwards.
        problems: file in which bad samples are listed.
        before: the samples of the run that goes on, if one does.

    Raises:
        EqatError: unreadable data, bad samples, or a model without a processor, or with another model's.
    """
    processor = load_speaker(folder, config.style)
    data = image_text_data(processor, config, problems)
    if before is not None:
        data = data.as_before(before) or data
    training, held_out, digest = _apart(data, config, lambda other: image_text_data(processor, other))
    order = SampleOrder(
        training.lengths, training.text_only, step, seed=config.seed, text_warmup_steps=config.text_warmup_steps
    )
    collator, digest = Collator(processor.tokenizer), f"{digest} {style_digest(processor)}"
    return Samples(training, collator, order, digest, sum(training.text_only), held_out, data.known.save)


def _apart(data: Any, config: ImageTextData, read: Callable[[ImageTextData], Any]) -> tuple[Any, Any, str]:
    """Return what is trained on, what is held out, if anything is, and a hash of both."""
    if config.held_out_source is not None:
        other = read(replace(config, source=config.held_out_source, count=config.held_out or None))
        return data, other, data.digest() + other.digest()
    if config.held_out:
        return *divided(data, config.held_out, config.seed), data.digest()
    return data, None, data.digest()
