"""Image-text samples: conversations about images, checked before training, encoded when they are asked for.

All problems of a source are found before the first step and reported together, with file and record:

- the format: unknown speaker, turns out of order, empty answer, `<image>` that does not match the images;
- images: outside the image folder, missing, or unreadable as far as `images.image_size` looks: the header, and the
  checksums of PNG files. Pixels are decoded when the sample is used; what breaks only then is an error that names the
  record;
- the chat template: it refuses the conversation, or loses an image. Whether it lets answers be told from the rest is
  tried on one sample of each number of turns, and again whenever a sample is used;
- the length: more tokens than `max_length`, those of the images counted. Nothing is cut.

The same pass gives every sample's length, by which `batching.SampleOrder` makes batches.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from eqat_mm.data.chat import Chat, Size
from eqat_mm.data.conversations import Conversation, Records, read_records
from eqat_mm.data.easy_vqa import EASY_VQA, easy_vqa_folder
from eqat_mm.data.images import image_size, read_image
from eqat_mm.data.problems import BadSample, OnBadSample, report
from eqat_mm.data.text_files import package_missing
from eqat_mm.errors import DataError
from eqat_mm.runtime.progress import progress
from eqat_mm.runtime.seeding import generator
from eqat_mm.runtime.settings import Count, CountOrZero, Seed, Settings

_PER_BATCH = 256


@dataclass(frozen=True)
class ImageTextData(Settings, option="conversations"):
    """Which conversations about images, and how they are checked and ordered.

    Attributes:
        source: LLaVA's format, .json or .jsonl, hf:NAME[:CONFIG[:SPLIT]] or demo-easy-vqa (see
            `eqat_mm.data.conversations`).
        image_folder: what the records' image paths are relative to. Default: the folder of the source file.
        count: number of records, drawn at random; None takes all.
        max_length: most tokens of a sample, those of its images counted. Longer ones are bad samples.
        on_bad_sample: `error` stops before training, `skip` leaves bad samples out and says how many.
        text_warmup_steps: optimizer steps at the beginning over which the share of samples without images falls from
            all to none; after that, samples come as they are drawn. 0: no warm-up.
        seed: which records are drawn, and their order.
    """

    source: str = EASY_VQA
    image_folder: Path | None = None
    count: Count | None = None
    max_length: Count = 2048
    on_bad_sample: OnBadSample = "error"
    text_warmup_steps: CountOrZero = 0
    seed: Seed = 0


class ImageTextDataset(Dataset[dict[str, Tensor]]):
    """Checked conversations; an item is encoded, and its images are read, when it is asked for.

    Args:
        chat: the model's processor.
        conversations: the samples.
        lengths: tokens of each sample.

    Attributes:
        lengths: tokens of each sample.
        text_only: for each sample, whether it has no image.
    """

    def __init__(self, chat: Chat, conversations: list[Conversation], lengths: list[int]) -> None:
        assert len(conversations) == len(lengths)
        self._chat = chat
        self._conversations = conversations
        self.lengths = lengths
        self.text_only = [not conversation.images for conversation in conversations]

    def __len__(self) -> int:
        return len(self._conversations)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return `input_ids` and `labels`, int64 [T], and the tensors of the images, first axis images.

        Raises:
            DataError: an image that could be opened cannot be decoded.
        """
        conversation = self._conversations[index]
        try:
            images = [read_image(source) for source in conversation.images]
            return self._chat.encode(conversation, images)
        except BadSample as error:
            raise DataError(
                conversation.where,
                str(error),
                "what was there when the samples were checked",
                "mend the file, or remove the record",
            ) from error

    def digest(self) -> str:
        """Return a hash of turns, image names and lengths, by which a changed source is noticed."""
        hashed = hashlib.blake2b(digest_size=16)
        for conversation, length in zip(self._conversations, self.lengths, strict=True):
            hashed.update(repr((conversation.turns, [str(image) for image in conversation.images], length)).encode())
        return hashed.hexdigest()


def image_text_data(processor: Any, config: ImageTextData) -> ImageTextDataset:
    """Read and check the samples that `config` names.

    Args:
        processor: the model's transformers processor.
        config: which samples.

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
    conversations, lengths, problems = _check(chat, records, chosen, config.max_length)
    report(records.source, problems, len(chosen), config.on_bad_sample)
    return ImageTextDataset(chat, conversations, lengths)


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


def _check(
    chat: Chat, records: Records, chosen: list[int], max_length: int
) -> tuple[list[Conversation], list[int], list[str]]:
    """Return the good samples, their lengths in tokens, and a line for each bad one."""
    conversations: list[Conversation] = []
    lengths: list[int] = []
    problems: dict[int, str] = {}
    inspector = _Inspector(chat, records)
    for start in progress(range(0, len(chosen), _PER_BATCH), what="check samples", unit="batch"):
        good: list[tuple[int, _Inspected]] = []
        for index in chosen[start : start + _PER_BATCH]:
            try:
                good.append((index, inspector.inspect(index)))
            except BadSample as problem:
                problems[index] = str(problem)
        counted = chat.lengths([sample.text for _, sample in good], [sample.sizes for _, sample in good])
        for (index, sample), length in zip(good, counted, strict=True):
            if length > max_length:
                problems[index] = f"{length:,} tokens, more than max_length ({max_length:,})"
            else:
                conversations.append(sample.conversation)
                lengths.append(length)
    return conversations, lengths, [f"{records.where(index)}: {problems[index]}" for index in sorted(problems)]


class _Inspected(NamedTuple):
    conversation: Conversation
    text: str
    sizes: list[Size]


class _Inspector:
    """Checks one record after the other for all but its length."""

    def __init__(self, chat: Chat, records: Records) -> None:
        self._chat = chat
        self._records = records
        self._size_of = lru_cache(maxsize=None)(image_size)  # published sets ask many questions about one image
        self._seen: set[int] = set()

    def inspect(self, index: int) -> _Inspected:
        conversation = self._records.conversation(index)
        sizes = [self._size_of(image) for image in conversation.images]
        text = self._chat.text(conversation)
        turns = len(conversation.turns)
        if turns not in self._seen:  # a matter of the template, hardly of the words
            self._chat.answers(conversation, text)
            self._seen.add(turns)
        return _Inspected(conversation, text, sizes)
