"""Image-text samples: conversations about images, checked before training, encoded when they are asked for.

All problems of a source are found before the first step and reported together, with file and record:

- the format: unknown speaker, turns out of order, empty answer, `<image>` that does not match the images;
- images: outside the image folder, missing, or unreadable as far as `images.image_size` looks: the header, and the
  checksums of PNG files. With `check: decode` their pixels, too;
- the chat template: it refuses the conversation, or loses an image. Whether it lets answers be told from the rest is
  tried on one sample of each number of turns, and again whenever a sample is used;
- the length: more tokens than `max_length`, those of the images counted. Nothing is cut.

What breaks only when a sample is used, as a JPEG file that was cut off, is an error that names the record, or with
`on_bad_sample: skip` the next good sample of its kind (with images, or without) stands in for it. Which one follows
from the files alone: all processes and a continued run take the same, and the number of steps stays what it was.

The same pass gives every sample's length, by which `batching.SampleOrder` makes batches.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset

from eqat_mm.data.chat import Chat
from eqat_mm.data.conversations import Conversation, Records, read_records
from eqat_mm.data.easy_vqa import EASY_VQA, easy_vqa_folder
from eqat_mm.data.images import decoded_size, image_size, read_image
from eqat_mm.data.inspection import Inspector, check_samples, require_short
from eqat_mm.data.problems import (
    BadSample,
    LateProblems,
    OnBadSample,
    Problem,
    Tolerance,
    refusals,
    report,
)
from eqat_mm.data.style import AUTO, ImageShape, Style, require_template
from eqat_mm.data.text_files import package_missing
from eqat_mm.errors import DataError
from eqat_mm.runtime.seeding import generator
from eqat_mm.runtime.settings import Count, CountOrZero, Fraction, Seed, Settings


@dataclass(frozen=True)
class ImageTextData(Settings, option="conversations"):
    """Which conversations about images, and how they are checked and ordered.

    Attributes:
        source: LLaVA's format, .json or .jsonl, hf:NAME[:CONFIG[:SPLIT]] or demo-easy-vqa (see
            `eqat_mm.data.conversations`).
        image_folder: what the records' image paths are relative to. Default: the folder of the source file.
        count: number of records, drawn at random; None takes all.
        template: of the conversation: `auto` (the one that the model was trained with), `vicuna_v1`, `model` (the one
            in its folder), or the path of a .jinja file. The checkpoint keeps it.
        images: what becomes of images that are no squares: `pad`, `crop`, `model` (what its folder says), or `auto`
            (what the model was trained with). The checkpoint keeps it.
        max_length: most tokens of a sample, those of its images counted. Longer ones are bad samples.
        check: how images are checked before training: `header`, or `decode`, which takes as long as reading them all.
        on_bad_sample: `error` stops before training, `skip` leaves bad samples out and says how many.
        max_skipped: largest share of the samples that `skip` may leave out; up to ten may always be.
        text_warmup_steps: optimizer steps at the beginning over which the share of samples without images falls from
            all to none; after that, samples come as they are drawn. 0: no warm-up.
        held_out: samples, drawn at random, that a model is not trained on but judged by.
        held_out_source: other conversations to judge it by instead, in the same format, with the same image folder.
        seed: which records are drawn, and their order.
    """

    source: str = EASY_VQA
    image_folder: Path | None = None
    count: Count | None = None
    template: str = AUTO
    images: ImageShape = AUTO
    max_length: Count = 2048
    check: Literal["header", "decode"] = "header"
    on_bad_sample: OnBadSample = "error"
    max_skipped: Fraction = 0.1
    text_warmup_steps: CountOrZero = 0
    held_out: CountOrZero = 0
    held_out_source: str | None = None
    seed: Seed = 0

    def check_together(self) -> None:
        """Check that the template is there, before anything is read."""
        require_template(self.template, f"--{self.option}template")

    @property
    def style(self) -> Style:
        """How the model is addressed."""
        return Style(self.template, self.images)


class ImageTextDataset(Dataset[dict[str, Tensor]]):
    """Checked conversations; an item is encoded, and its images are read, when it is asked for.

    Args:
        chat: the model's processor.
        conversations: the samples.
        lengths: tokens of each sample.
        max_length: most tokens of a sample.
        late: takes note of samples that turn out to be bad.

    Attributes:
        lengths: tokens of each sample.
        text_only: for each sample, whether it has no image.
    """

    def __init__(
        self, chat: Chat, conversations: list[Conversation], lengths: list[int], max_length: int, late: LateProblems
    ) -> None:
        assert len(conversations) == len(lengths)
        self._chat = chat
        self._conversations = conversations
        self._max_length = max_length
        self._late = late
        self.lengths = lengths
        self.text_only = [not conversation.images for conversation in conversations]

    def __len__(self) -> int:
        return len(self._conversations)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return `input_ids` and `labels`, int64 [T], and the tensors of the images, first axis images.

        Raises:
            DataError: the sample cannot be used after all, and no other may stand in for it.
        """
        for candidate in chain(range(index, len(self)), range(index)):
            if self.text_only[candidate] == self.text_only[index]:
                try:
                    return self._encoded(self._conversations[candidate])
                except BadSample as error:
                    self._late.add(Problem.of(self._conversations[candidate].where, error))
        raise DataError(
            self._conversations[index].where,
            f"no sample {'without' if self.text_only[index] else 'with'} images can be used any more",
            "what was there when the samples were checked",
            "make the files readable again",
        )

    def _encoded(self, conversation: Conversation) -> dict[str, Tensor]:
        images = [read_image(source) for source in conversation.images]
        with refusals():
            sample = self._chat.encode(conversation, images)
        require_short(len(sample["input_ids"]), self._max_length)
        return sample

    def digest(self) -> str:
        """Return a hash of turns, image names and lengths, by which a changed source is noticed."""
        hashed = hashlib.blake2b(digest_size=16)
        for conversation, length in zip(self._conversations, self.lengths, strict=True):
            hashed.update(repr((conversation.turns, [str(image) for image in conversation.images], length)).encode())
        return hashed.hexdigest()


def image_text_data(processor: Any, config: ImageTextData, problems: Path | None = None) -> ImageTextDataset:
    """Read and check the samples that `config` names.

    Args:
        processor: the model's transformers processor.
        config: which samples.
        problems: file in which bad samples are listed, those found later, too; one of before is replaced.

    Raises:
        DataError: an unreadable source, bad samples, or fewer records than `count`.
        ConfigError: a package is missing, or the processor cannot do chats about images.
    """
    for module, package in (("PIL", "pillow"), ("torchvision", "torchvision")):
        if find_spec(module) is None:
            raise package_missing("image-text data", package)
    chat = Chat(processor)
    source = str(easy_vqa_folder() / "train.json") if config.source == EASY_VQA else config.source
    records = read_records(source, config.image_folder)
    chosen = _draw(records, config)
    look = {"header": image_size, "decode": decoded_size}[config.check]
    conversations, lengths, bad = check_samples(Inspector(chat, records, config.max_length, look), chosen)
    tolerance = Tolerance(config.on_bad_sample, config.max_skipped, problems)
    report(records.source, bad, len(chosen), tolerance)
    late = LateProblems(records.source, len(conversations), tolerance)
    return ImageTextDataset(chat, conversations, lengths, config.max_length, late)


def _draw(records: Records, config: ImageTextData) -> list[int]:
    """Return the indices of the records to use, in their stored order."""
    if config.count is None:
        return list(range(len(records)))
    if config.count > len(records):
        raise DataError(
            records.source,
            f"{len(records):,} records",
            f"at least count ({config.count:,})",
            "lower count, or leave it out to take all records",
        )
    order = torch.randperm(len(records), generator=generator(config.seed, "image-text records"))
    return sorted(order[: config.count].tolist())
