"""Image-text samples: conversations about images, checked before training, encoded when they are asked for.

All problems of a source are found before the first step and reported together, with file and record:

- the format: unknown speaker, turns out of order, empty answer, `<image>` that does not match the images;
- images: outside the image folder, missing, or unreadable as far as `images.image_size` looks: the header, and the
  checksums of PNG files. With `check: decode` their pixels, too;
- the chat template: it refuses the conversation, or loses an image. Whether it lets answers be told from the rest is
  tried on one sample of each number of turns, and again whenever a sample is used;
- the length: more tokens than `max_length`, those of the images counted. `too_long: truncate` cuts such a sample, as
  LLaVA does, unless no answer or only a part of an image would be left.

What is found is kept in an index (`data.preparing`), so that a source is looked through once, not at every start and in
every process. An index gives every sample's length, too, by which `batching.SampleOrder` makes batches.

What breaks only when a sample is used, as a JPEG file that was cut off, is an error that names the record, or with
`on_bad_sample: skip` the next good sample of its kind (with images, or without) stands in for it. Which one follows
from the files alone: all processes and a continued run take the same, and the number of steps stays what it was.
"""

from __future__ import annotations

import hashlib
import os
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from eqat_mm.data.image_text.chat import IGNORED, Chat
from eqat_mm.data.image_text.columns import rows_of
from eqat_mm.data.image_text.conversations import MENDED, Records
from eqat_mm.data.image_text.images import read_image
from eqat_mm.data.image_text.index import Array, Index
from eqat_mm.data.image_text.inspection import require_short
from eqat_mm.data.image_text.kept import Kept
from eqat_mm.data.image_text.preparing import Preparation
from eqat_mm.data.image_text.problems import (
    KINDS,
    BadSample,
    LateProblems,
    Problem,
    Tolerance,
    TooLong,
    refusals,
    report,
)
from eqat_mm.data.image_text.record_sources import Source, open_source
from eqat_mm.data.image_text.settings import ImageTextData
from eqat_mm.data.image_text.worker_errors import told_outside
from eqat_mm.data.text.files import package_missing
from eqat_mm.data.user_files import printable
from eqat_mm.errors import DataError
from eqat_mm.runtime.plugins import CONVERSATIONS, plugged, plugged_function
from eqat_mm.runtime.progress import say


class ImageTextDataset(Dataset[dict[str, Tensor]]):
    """Checked conversations; an item is read and encoded, and so are its images, when it is asked for.

    Args:
        chat: the model's processor.
        records: of the source.
        places: which of the records each sample is, int64 [samples]; below 0 for one that is gone.
        known: what is known of each sample.
        config: which samples.
        late: takes note of samples that turn out to be bad.

    Attributes:
        known: contents and tokens of each sample.
        lengths: tokens of each sample, cut where they are to be.
        text_only: for each sample, whether it has no image.
        visual: the tokens that stand for images, int64 [n].
    """

    def __init__(
        self, chat: Chat, records: Records, places: Array, known: Kept, config: ImageTextData, late: LateProblems
    ) -> None:
        assert len(places) == len(known.contents)
        self._chat = chat
        self._records = records
        self._places = places
        self._config = config
        self._late = late
        self.known = known
        self.lengths: list[int] = np.minimum(known.lengths, config.max_length).tolist()
        self.text_only: list[bool] = known.text_only.tolist()
        self.visual: Tensor = chat.of_images

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return `input_ids`, `labels` and other rows of tokens, [T, ...], and the tensors of the images.

        Raises:
            DataError: the sample cannot be used after all, and no other may stand in for it.
        """
        with told_outside():
            return self._usable_from(index)

    def _usable_from(self, index: int) -> dict[str, Tensor]:
        for candidate in chain(range(index, len(self)), range(index)):
            if self.text_only[candidate] == self.text_only[index] and self._places[candidate] >= 0:
                try:
                    return self._encoded(int(self._places[candidate]))
                except BadSample as error:
                    self._late.add(Problem.of(self._where(candidate), error))
        raise DataError(
            self._where(index),
            f"no sample {'without' if self.text_only[index] else 'with'} images can be used any more",
            "what was there when the samples were checked",
            "make the files readable again",
        )

    def _where(self, index: int) -> str:
        place = int(self._places[index])
        return self._records.where(place) if place >= 0 else self._records.source

    def _encoded(self, place: int) -> dict[str, Tensor]:
        conversation = self._records.conversation(place)
        images = [read_image(source) for source in conversation.images]
        with refusals():
            sample = self._chat.encode(conversation, images)
        if self._config.too_long == "truncate":
            return self._cut(sample)
        require_short(len(sample["input_ids"]), self._config.max_length)
        return sample

    def _cut(self, sample: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the first `max_length` tokens of a sample, if all its images and a part of an answer are in them."""
        length, most = len(sample["input_ids"]), self._config.max_length
        if length <= most:
            return sample
        if torch.isin(sample["input_ids"][most:], self._chat.of_images).any():
            raise TooLong(f"{length:,} tokens, and the end of an image behind max_length ({most:,})")
        if (sample["labels"][:most] == IGNORED).all():
            raise TooLong(f"{length:,} tokens, and no answer before max_length ({most:,})")
        return sample | {name: row[:most] for name, row in rows_of(sample).items()}

    def as_before(self, kept: Kept) -> ImageTextDataset | None:
        """Return these samples in the order of an earlier time, whose own are found by what they say.

        Those that are gone since then keep their places, where others stand in for them; new ones are left out. None
        where too many are gone for it to be the same data.
        """
        places = kept.found_in(self.known, self._places)
        gone = int((places < 0).sum())
        tolerance = Tolerance("skip", self._config.max_skipped)
        if not tolerance.allows(gone, len(places)):
            return None
        new = len(self) - len(places) + gone
        if gone or new > 0:
            say(
                f"{self._records.source} has changed since this run began: {gone:,} of its {len(places):,} samples are "
                f"gone, and others stand in for them" + (f"; {new:,} new ones are not used" if new > 0 else "")
            )
        return ImageTextDataset(self._chat, self._records, places, kept, self._config, self._late)

    def digest(self) -> str:
        """Return a hash of turns and image names, by which changed data are noticed."""
        return hashlib.blake2b(self.known.contents.tobytes(), digest_size=16).hexdigest()


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
    chat, source = _opened(processor, config)
    index, _ = _preparation(chat, source, config).index(
        decode=config.check == "decode", look_again=config.on_bad_sample == "error"
    )
    records = source.records(index.places)
    good = _usable(index, config)
    tolerance = Tolerance(config.on_bad_sample, config.max_skipped, problems, config.too_long)
    report(records.source, _problems(index, records, np.flatnonzero(~good)), len(index), tolerance)
    places = np.flatnonzero(good)
    _say_what_is_mended(index, places, config, records.source)
    known = Kept(index.contents[places], index.lengths[places], index.shown[places] == 0)
    return ImageTextDataset(chat, records, places, known, config, LateProblems(records.source, len(places), tolerance))


def prepare(processor: Any, config: ImageTextData, problems: Path | None) -> tuple[Index, Path]:
    """Look through the samples that `config` names, say what is wrong with them, and keep what was found.

    Args:
        processor: the model's transformers processor.
        config: which samples.
        problems: file in which bad samples are listed; by default one beside the index.

    Returns:
        The index, and the file that it is in.

    Raises:
        DataError: an unreadable source, no sample that can be used, or fewer records than `count`.
        ConfigError: a package is missing, or the processor cannot do chats about images.
    """
    chat, source = _opened(processor, config)
    index, path = _preparation(chat, source, config).index(decode=config.check == "decode", look_again=True)
    records, good = source.records(index.places), _usable(index, config)
    tolerance = Tolerance("skip", 1.0, problems or path.with_name("problems.jsonl"), "skip")
    report(records.source, _problems(index, records, np.flatnonzero(~good)), len(index), tolerance)
    _say_what_is_mended(index, np.flatnonzero(good), config, records.source)
    return index, path


def _opened(processor: Any, config: ImageTextData) -> tuple[Chat, Source]:
    """Return processor and source, after what is cheap to check."""
    for module, package in (("PIL", "pillow"), ("torchvision", "torchvision")):
        if find_spec(module) is None:
            raise package_missing("image-text data", package)
    # Processes do this work side by side: threads of the library would not help, and forking them is warned of.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    chat = Chat(processor)
    brought = config.source in plugged(CONVERSATIONS)
    name = str(plugged_function(CONVERSATIONS, config.source)()) if brought else config.source
    return chat, open_source(name, config.image_folder)


def _preparation(chat: Chat, source: Source, config: ImageTextData) -> Preparation:
    return Preparation(source, chat, config.max_length, config.count, config.seed)


def _usable(index: Index, config: ImageTextData) -> Array:
    """Return for each record whether it is a sample, bool [n]."""
    good: Array = index.kinds == 0
    return good | index.cuts if config.too_long == "truncate" else good


def _problems(index: Index, records: Records, bad: Array) -> list[Problem]:
    words = index.words() if len(bad) else {}
    return [Problem(records.where(at), KINDS[int(index.kinds[at]) - 1], words[at]) for at in bad.tolist()]


def _say_what_is_mended(index: Index, places: Array, config: ImageTextData, source: str) -> None:
    counts = {f"longer than max_length ({config.max_length:,}), cut": int((index.kinds[places] != 0).sum())}
    for bit, what in enumerate(MENDED):
        counts[what] = int((index.mended[places] & (1 << bit) != 0).sum())
    lines = [f"    {count:,} {what}" for what, count in counts.items() if count]
    if lines:
        say("\n".join([f"{printable(source)}: of {len(places):,} samples are taken as LLaVA takes them:", *lines]))
