"""Samples are looked through once: the index of a source is made by one process with all cores, and mapped by all.

It lies in `FILE.prepared/` beside the file, or below the cache of eqat-mm where that folder cannot be written or the
source is a data set of the hub. Its name is a hash of what decides it: the source (size, time, contents in 64 places),
template, tokenizer and processor, the image folder, `max_length`, and which records are drawn. The images themselves
are not part of it: one that goes or breaks later is found when its turn comes. Images that were missing or unreadable
are looked for again wherever they would be an error.
"""

from __future__ import annotations

import fcntl
import gc
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors import SafetensorError, safe_open

from eqat_mm.data.image_text.chat import Chat
from eqat_mm.data.image_text.conversations import IMAGE, Conversation, Records, Turn
from eqat_mm.data.image_text.images import ImageSource, Size, decoded_size, image_size
from eqat_mm.data.image_text.index import Index, collected, joined
from eqat_mm.data.image_text.inspection import Finding, Inspector, hash_of
from eqat_mm.data.image_text.problems import BadSample, Inexact, MissingImage, UnreadableImage, refusals
from eqat_mm.data.image_text.quick_lengths import ExactLengths, QuickLengths
from eqat_mm.data.image_text.record_files import Places
from eqat_mm.data.image_text.record_sources import Source
from eqat_mm.data.image_text.spread import spread
from eqat_mm.data.user_files import printable
from eqat_mm.errors import DataError
from eqat_mm.runtime.files import cache_folder
from eqat_mm.runtime.progress import say
from eqat_mm.runtime.seeding import generator

_LAYOUT = 1  # raise it whenever an index means something else than before
_PER_BATCH = 256
_FEW = 2048
"""Records for which no shortcut is worth its while."""

_HOPELESS = 1000
"""Images missing, and none there."""

_HEAD_START = 5.0  # seconds
_PROBE = (
    Turn("user", f"{IMAGE}\nWhat is it?"),
    Turn("assistant", "A cat."),
    Turn("user", "Is it big?"),
    Turn("assistant", "Yes."),
)


TOO_FEW = "conversations.count"
"""What an error asks for where a source has fewer records than were asked for."""


class Preparation:
    """How the index of a source is made and found.

    Args:
        source: of records.
        chat: the model's processor.
        max_length: most tokens of a sample.
        count: number of records, drawn at random; None takes all.
        seed: which are drawn.
    """

    def __init__(self, source: Source, chat: Chat, max_length: int, count: int | None, seed: int) -> None:
        self._source, self._chat, self._max_length = source, chat, max_length
        self._count, self._seed = count, seed
        self._stamp = source.stamp()

    def index(self, *, decode: bool = False, look_again: bool = False) -> tuple[Index, Path]:
        """Return the index, made if need be, and the file that it is in.

        Args:
            decode: of every image, the pixels have been read once.
            look_again: images that were missing or unreadable have been looked for just now.

        Raises:
            DataError: an unreadable source, no records or too few, or a thousand images missing and none there.
        """
        plain, decoded = self._files()
        with _alone_in(plain.parent, unless=decoded if decode else plain):
            with_pixels = Index.open(decoded)
            path = plain if with_pixels is None else decoded
            index = Index.open(plain) if with_pixels is None else with_pixels
            if index is None:
                self._forget_others(plain.parent)
                index = self._made()
                index.save(plain, self._stamp)
            elif look_again and len(index.without_images) and _can_write(path.parent):
                index = self._looked_again(index, image_size if with_pixels is None else decoded_size)
                index.save(path, self._stamp)
            if decode and with_pixels is None:
                self._decoded(index).save(decoded, self._stamp)
                path = decoded
            found = Index.open(path)
        assert found is not None, path
        return found, path

    def _files(self) -> tuple[Path, Path]:
        """Return where the index is, or is to be, and where the one of decoded images is."""
        drawn = None if self._count is None else (self._count, self._seed)
        folder = str(self._source.image_folder.resolve())
        makers = (_LAYOUT, transformers.__version__, _identity(self._chat))
        decides = (*makers, self._stamp, folder, self._max_length, drawn)
        name = f"{hash_of(*decides):016x}"
        folders = _folders(self._source)
        found = [each for each in folders if (each / f"{name}.safetensors").is_file()]
        place = (found or [each for each in folders if _can_write(each)] or folders)[0]
        return place / f"{name}.safetensors", place / f"{name}.decoded.safetensors"

    def _forget_others(self, folder: Path) -> None:
        """Remove the indices of what the source was before."""
        for path in folder.glob("*.safetensors"):
            with suppress(OSError, SafetensorError, TypeError), safe_open(path, "np") as file:
                if file.metadata()["stamp"] != self._stamp:
                    path.unlink()

    def _made(self) -> Index:
        places = self._source.places()
        chosen = self._drawn(len(places.starts))
        places = places if chosen is None else places.of(chosen)
        records = self._source.records(places)
        try:
            return self._inspected(records, places, self._shortcut(records))
        except Inexact as error:
            say(f"{self._source.name}: {error} must be asked for every sample, which takes a few times as long")
            return self._inspected(records, places, ExactLengths(self._chat))

    def _drawn(self, total: int) -> list[int] | None:
        """Return the indices of the records to use, in their stored order; None for all."""
        if not total:
            raise DataError(printable(self._source.name), "no records", "at least one", "check the contents")
        if self._count is None:
            return None
        if self._count > total:
            raise DataError(
                self._source.name,
                f"{total:,} records",
                f"at least {TOO_FEW}, {self._count:,}",
                f"set conversations.count to {total:,} or fewer, or to null, which takes all records",
            )
        order = torch.randperm(total, generator=generator(self._seed, "image-text records"))
        return sorted(order[: self._count].tolist())

    def _shortcut(self, records: Records) -> ExactLengths:
        samples: list[Conversation] = []
        for index in range(_PER_BATCH) if len(records) > _FEW else ():
            with suppress(BadSample):
                conversation = records.conversation(index)
                self._chat.text(conversation)
                samples.append(conversation)
        return QuickLengths(self._chat, samples) if samples else ExactLengths(self._chat)

    def _inspected(self, records: Records, places: Places, lengths: ExactLengths) -> Index:
        inspector = Inspector(lengths, records, self._max_length, image_size)
        stretches = [range(at, min(at + _PER_BATCH, len(records))) for at in range(0, len(records), _PER_BATCH)]
        parts: list[Index] = []
        missing = shown = 0
        for part in spread(lambda each: _part_of(inspector, places, each), stretches, "check samples"):
            parts.append(part)
            missing, shown = missing + len(part.of_kind(MissingImage)), shown + len(part.owners)
            if missing >= _HOPELESS and not shown:
                raise self._hopeless(joined(parts), missing)
        return joined(parts)

    def _hopeless(self, index: Index, missing: int) -> DataError:
        first = int(index.of_kind(MissingImage)[0])
        where = self._source.records(index.places).where(first)
        return DataError(
            printable(self._source.name),
            f"the first {missing:,} images are all missing, beginning with {where}: {index.words()[first]}",
            f"images below {printable(self._source.image_folder)}",
            MissingImage.do,
        )

    def _looked_again(self, index: Index, look: Callable[[ImageSource], Size]) -> Index:
        again = index.without_images.tolist()
        records = self._source.records(index.places)
        inspector = Inspector(ExactLengths(self._chat), records, self._max_length, look)
        stretches = [again[at : at + _PER_BATCH] for at in range(0, len(again), _PER_BATCH)]
        found = spread(inspector.inspect_all, stretches, "look for images again")
        return index.corrected(again, [*chain.from_iterable(found)])

    def _decoded(self, index: Index) -> Index:
        """Return the index after reading every image once; those that cannot be read make their records bad."""
        records = self._source.records(index.places)
        _, firsts = np.unique(index.images, return_index=True)
        within = np.arange(len(index.owners)) - np.searchsorted(index.owners, index.owners)
        images = [(int(at), int(index.owners[at]), int(within[at])) for at in np.sort(firsts)]
        stretches = [images[at : at + _PER_BATCH // 8] for at in range(0, len(images), _PER_BATCH // 8)]
        found = spread(lambda each: _unreadable(records, each), stretches, "decode images")
        broken = {int(index.images[at]): said for at, said in chain.from_iterable(found)}
        bad = {
            int(owner): broken[int(image)]
            for owner, image in zip(index.owners, index.images, strict=True)
            if int(image) in broken
        }
        findings = [Finding(content=int(index.contents[at]), problem=UnreadableImage(said)) for at, said in bad.items()]
        return index.corrected([*bad], findings) if bad else index


def _part_of(inspector: Inspector, places: Places, indices: range) -> Index:
    with _uncollected():
        return collected(places.of(indices), inspector.inspect_all(indices))


@contextmanager
def _uncollected() -> Iterator[None]:
    """Let Python look for no cycles of objects in the body, which makes millions of objects and no cycles."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _unreadable(records: Records, images: Sequence[tuple[int, int, int]]) -> list[tuple[int, str]]:
    """Return which of some images, each with its record and its place there, cannot be read, and why."""
    found = []
    for at, record, place in images:
        try:
            decoded_size(records.conversation(record).images[place])
        except (BadSample, IndexError) as error:
            found.append((at, str(error)))
    return found


def _identity(chat: Chat) -> int:
    """Return a hash of what template, tokenizer and processor make of conversations."""
    processor, images = chat.processor, chat.processor.image_processor.to_dict()
    tokenizer = json.loads(chat.tokenizer.backend_tokenizer.to_str()) | {"truncation": None, "padding": None}
    try:
        with refusals():
            text = chat.text(Conversation("", _PROBE, (None,)))  # type: ignore[arg-type]
            tried = f"{text} {chat.lengths([text, text], [[(90, 40)], [(336, 672)]])}"
    except BadSample as error:  # so will be all samples
        tried = str(error)
    return hash_of(type(processor).__name__, processor.chat_template, json.dumps(tokenizer), repr(images), tried)


def _folders(source: Source) -> list[Path]:
    """Return where indices of a source may be, the best place first."""
    name = source.name if source.file is None else source.file.resolve()
    beside = [] if source.file is None else [source.file.with_name(f"{source.file.name}.prepared")]
    return [*beside, cache_folder() / "prepared" / f"{hash_of(name):016x}"]


def _can_write(folder: Path) -> bool:
    return os.access(folder if folder.is_dir() else folder.parent, os.W_OK)


@contextmanager
def _alone_in(folder: Path, unless: Path) -> Iterator[None]:
    """Let one process of a machine at a time into the body; the first of several goes first, and is heard."""
    late = time.monotonic() + _HEAD_START
    while os.environ.get("LOCAL_RANK", "0") != "0" and not unless.is_file() and time.monotonic() < late:
        time.sleep(0.1)
    with suppress(PermissionError):
        folder.mkdir(parents=True, exist_ok=True)
    try:
        lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o666)
    except PermissionError:  # another's index, which is only read
        yield
        return
    try:
        with suppress(OSError):  # a file system without locks: each makes its own then
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)
