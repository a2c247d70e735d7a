"""From a job's data settings to what a trainer takes: text windows, conversations, or both."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import transformers
from torch.utils.data import Dataset

from eqat_mm.checkpoint.folders import load_tokenizer
from eqat_mm.checkpoint.speaker import load_listener, style_digest
from eqat_mm.commands.plumbing.end_to_end_job import EndToEndJob
from eqat_mm.commands.plumbing.instructions import require_instructions
from eqat_mm.data.image_text.batching import Collator, SampleOrder
from eqat_mm.data.image_text.held_out import divided
from eqat_mm.data.image_text.kept import Kept
from eqat_mm.data.image_text.mixed import Mixed, windows_beside
from eqat_mm.data.image_text.prefix import filling_of
from eqat_mm.data.image_text.samples import image_text_data
from eqat_mm.data.image_text.settings import ImageTextData
from eqat_mm.data.text.settings import TextWindows
from eqat_mm.data.text.windows import TOO_LITTLE, digest_of, text_windows
from eqat_mm.errors import DataError
from eqat_mm.runtime.device import processes
from eqat_mm.runtime.progress import say
from eqat_mm.train.end_to_end import Sample, WindowDataset
from eqat_mm.train.held_out import HeldOut
from eqat_mm.train.imageless import blank_image


@dataclass(frozen=True)
class Samples:
    """Training data of an end-to-end trainer.

    Attributes:
        dataset: the samples.
        collator: makes a batch of them; None stacks them.
        order: in which they come; None shuffles them.
        digest: a hash by which changed data is noticed.
        held_out: samples to judge the model by; None where there are none.
        keep: writes into the folder of a run what it needs to find its samples again where the data change.
    """

    dataset: Any
    collator: transformers.DataCollator | None
    order: SampleOrder | None
    digest: str
    held_out: Any = None
    keep: Callable[[Path], None] = lambda folder: None

    def some(self, most: int) -> Iterator[Sample]:
        """Yield a few samples: of text the first, which were drawn at random; else some from all over the data."""
        count = min(most, len(self.dataset))
        step = 1 if self.order is None else len(self.dataset) // count
        return (self.dataset[index * step] for index in range(count))

    def blank(self) -> Sample | None:
        """Return the tensors of an image without content, where some samples have images and some have not."""
        data = [each for each in (self.dataset, self.held_out) if hasattr(each, "text_only")]
        if {is_text for each in data for is_text in each.text_only} != {True, False}:
            return None
        return next(blank_image(each[each.text_only.index(False)]) for each in data if False in each.text_only)

    def judge(self, job: EndToEndJob, arguments: transformers.TrainingArguments) -> HeldOut | None:
        """Return this process's share of what is held out, if anything is."""
        if self.held_out is None:
            return None
        place = {"rank": arguments.process_index, "world": arguments.world_size}
        return HeldOut.of(self.held_out, self.collator, job.held_out_steps, job.batch_size, **place)


def checked_samples(folder: Path, job: EndToEndJob, output: Path) -> Samples:
    """Return what a job trains on, as `samples_of`, enough of it for its steps.

    Raises:
        EqatError: as `samples_of`, and fewer steps than the learning rate takes to rise.
    """
    samples = samples_of(folder, job, output)
    job.check_warmup_of(len(samples.dataset), processes())
    return samples


def samples_of(folder: Path, job: EndToEndJob, output: Path) -> Samples:
    """Return what a job reads, in the tokens of the model in `folder`.

    Args:
        folder: of the model.
        job: with its data decided.
        output: folder of the run, which may be there already.

    Raises:
        EqatError: unreadable data or tokenizer, bad samples, or too little text.
    """
    if job.conversations is None:
        return text_samples(folder, job.data)
    require_instructions(job.conversations)
    step = job.batch_size * job.accumulation * processes()
    before = None if job.overwrite else Kept.open(output)
    mixed = None if job.text_share is None else (job.data, job.text_share)
    return image_text_samples(folder, job.conversations, step, problems_of(output), before, mixed)


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
    folder: Path,
    config: ImageTextData,
    step: int,
    problems: Path,
    before: Kept | None = None,
    mixed: tuple[TextWindows, float] | None = None,
) -> Samples:
    """Return checked conversations, with the processor of the model in `folder`.

    Args:
        folder: of the model.
        config: which conversations.
        step: samples in one optimizer step, over all processes and accumulated forwards.
        problems: file in which bad samples are listed.
        before: the samples of the run that goes on, if one does.
        mixed: text whose windows are to be among the samples, and their share.

    Raises:
        EqatError: unreadable data, bad samples, too little text, or a model without a processor, or with another
            model's.
    """
    processor = load_listener(folder, config.style)
    data = image_text_data(processor, config, problems)
    if before is not None:
        data = data.as_before(before) or data
    training, held_out, digest = _apart(data, config, lambda other: image_text_data(processor, other))
    if mixed is not None:
        training, of_text = _with_text(training, folder, *mixed)
        digest += of_text
    order = SampleOrder(
        training.lengths, training.text_only, step, seed=config.seed, text_warmup_steps=config.text_warmup_steps
    )
    collator = Collator(processor.tokenizer, filling=filling_of(processor))
    return Samples(training, collator, order, f"{digest} {style_digest(processor)}", held_out, data.known.save)


def _apart(data: Any, config: ImageTextData, read: Callable[[ImageTextData], Any]) -> tuple[Any, Any, str]:
    """Return what is trained on, what is held out, if anything is, and a hash of both."""
    if config.held_out_source is not None:
        other = read(replace(config, source=config.held_out_source, count=config.held_out or None))
        return data, other, data.digest() + other.digest()
    if config.held_out:
        return *divided(data, config.held_out, config.seed), data.digest()
    return data, None, data.digest()


def _with_text(conversations: Any, folder: Path, config: TextWindows, share: float) -> tuple[Dataset[Sample], str]:
    """Return conversations with windows of text behind them, and a hash of these."""
    count = windows_beside(len(conversations), share)
    try:
        windows = text_windows(load_tokenizer(folder), replace(config, count=count))
    except DataError as error:
        if error.where != TOO_LITTLE:
            raise
        raise DataError(
            where=f"--text_share {share:g}, {count:,} windows of text beside {len(conversations):,} conversations",
            given=error.given,
            allowed=error.allowed,
            do="give more text with --data.source, or lower --text_share or --data.length",
        ) from error
    say(f"{len(conversations):,} conversations and {count:,} windows of text, {count * windows.shape[1]:,} tokens")
    return Mixed(conversations, windows), digest_of(windows)
