r"""The instruction format of LLaVA: conversations about images, read and checked without opening an image.

A record is `{"id": ..., "image": "a.jpg", "conversations": [{"from": "human", "value": "<image>\nWhat is it?"},
{"from": "gpt", "value": "A cat."}, ...]}`. `image` is a path, a list of paths, or missing for text alone; every
`<image>` in a human turn stands for the next image. `user` and `assistant` are understood as names, too, and a first
turn `system`. Other fields are ignored.

Sources
- a `.json` file: a list of records, counted from 0 in messages.
- a `.jsonl` file: one record per line, lines counted from 1. Blank lines are skipped.
- `hf:NAME[:CONFIG[:SPLIT]]`: a Hugging Face data set with these columns (see `eqat_mm.data.hub`); `image` holds
  paths or images.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from eqat_mm.data.hub import HUB_PREFIX, load_hub
from eqat_mm.data.images import ImageFile, ImageSource, TableImage, file_below
from eqat_mm.data.problems import BadSample
from eqat_mm.data.record_files import FileRows, Places, places_in
from eqat_mm.data.user_files import printable, require_file, shown, told, user_path
from eqat_mm.errors import DataError
from eqat_mm.runtime.files import fingerprint_of

IMAGE = "<image>"
"""What stands for an image in a human turn, whatever the model's own image token is."""

Role = Literal["system", "user", "assistant"]
Mended = str
FIRST_BY_MODEL = "first turn by the model, left out"
IMAGE_REPEATED = "several <image> in a turn for one image, read as one"
IMAGE_IS_TEXT = "<image> without an image, read as text"
IMAGE_NOT_SHOWN = "image without <image>, not shown"
MENDED = (FIRST_BY_MODEL, IMAGE_REPEATED, IMAGE_IS_TEXT, IMAGE_NOT_SHOWN)
"""In what records of the published data depart from the format, and how LLaVA reads them nevertheless."""

_ROLES: dict[str, Role] = {
    "human": "user",
    "gpt": "assistant",
    "system": "system",
    "user": "user",
    "assistant": "assistant",
}
_SOURCES = "a .json or .jsonl file in LLaVA's format, hf:NAME[:CONFIG[:SPLIT]] or demo-easy-vqa"


class Turn(NamedTuple):
    """One turn: who speaks, and the text without white space at its ends."""

    role: Role
    text: str


@dataclass(frozen=True)
class Conversation:
    """A record that keeps to the format.

    Attributes:
        where: file and record, for messages.
        turns: maybe one of the system, then user and assistant in turn, an assistant's last.
        images: one for every `<image>` in the turns, in this order; where there are none, `<image>` is text.
        mended: in what it departs from the format, as the published data do, and was read as LLaVA reads it.
    """

    where: str
    turns: tuple[Turn, ...]
    images: tuple[ImageSource, ...]
    mended: tuple[Mended, ...] = ()


@dataclass(frozen=True)
class Records:
    """The records of one source, as stored.

    Attributes:
        source: file or data set.
        rows: dictionaries, if the source keeps to the format.
        counted: what a record is called in messages: `record`, `line` or `row`.
        places: where each record is in its file; of a data set only the numbers of rows count.
        image_folder: paths of images are relative to it.
    """

    source: str
    rows: Sequence[Any]
    counted: str
    places: Places
    image_folder: Path

    def __len__(self) -> int:
        return len(self.rows)

    def where(self, index: int) -> str:
        """Return the name of a record in messages."""
        return printable(f"{self.source}, {self.counted} {self.places.numbers[index]}")

    def conversation(self, index: int) -> Conversation:
        """Return one record, checked for everything but the images' contents.

        Raises:
            BadSample: it does not keep to the format, or names an image outside the image folder.
        """
        try:
            record = self.rows[index]
        except (ValueError, ArithmeticError, LookupError) as error:  # a table's row that is not what its schema says
            raise BadSample(told(error)) from error
        if not isinstance(record, dict):
            raise BadSample(f"a JSON {type(record).__name__} instead of an object")
        turns, mended = _turns(record.get("conversations"))
        images = self._images(record.get("image"), index)
        turns, images, more = _placed(turns, images)
        return Conversation(self.where(index), turns, images, mended + more)

    def _images(self, value: Any, index: int) -> tuple[ImageSource, ...]:
        values = value if isinstance(value, list) else [] if value in (None, "") else [value]
        return tuple(self._image(value, index, position) for position, value in enumerate(values))

    def _image(self, value: Any, index: int, position: int) -> ImageSource:
        if isinstance(value, str) and value:
            return file_below(self.image_folder, value)
        if isinstance(value, dict) and isinstance(self.rows, _StoredRows):
            return self.rows.image(value, index, position)
        raise BadSample(f"image is {shown(value)}, not a path")


@dataclass(frozen=True)
class Source:
    """A source that is there: a file, or a table of the hub.

    Attributes:
        name: as it was given.
        image_folder: paths of images are relative to it.
        file: the file; None for a table.
        table: the table; None for a file.
    """

    name: str
    image_folder: Path
    file: Path | None = None
    table: Any = None

    def stamp(self) -> str:
        """Return what is another where the contents are, as far as size, time and 64 places of a large file tell."""
        if self.file is None:
            return str(self.table._fingerprint)
        return f"{self.file.stat().st_mtime_ns} {fingerprint_of([self.file])}"

    def places(self) -> Places:
        """Look through the source for its records.

        Raises:
            DataError: a file is not UTF-8, not JSON, or no list.
        """
        if self.file is not None:
            return places_in(self.file)
        numbers = np.arange(len(self.table))
        return Places(numbers, numbers, numbers)

    def records(self, places: Places) -> Records:
        """Return those records that are in these places."""
        if self.file is not None:
            counted = "line" if self.file.suffix.lower() == ".jsonl" else "record"
            return Records(str(self.file), FileRows(self.file, places), counted, places, self.image_folder)
        rows = _StoredRows(self.table.select(places.numbers))
        return Records(self.name, rows, "row", places, self.image_folder)


def open_source(name: str, image_folder: Path | None = None) -> Source:
    """Check that a source is there, without looking into it; see the module for what it may be.

    Args:
        name: a `.json` or `.jsonl` file or a data set of the hub.
        image_folder: folder that the records' image paths are relative to. Default: that of the file, or the
            working directory for a data set of the hub.

    Raises:
        DataError: no such file, another type of file, or no such image folder.
        ConfigError: an optional package that this source needs is not installed.
    """
    path = user_path(name, _SOURCES)
    is_hub = name.startswith(HUB_PREFIX)
    folder = image_folder or (Path() if is_hub else path.parent)
    if not os.path.isdir(folder):
        raise DataError(
            printable(f"image folder {folder}"), "no such folder", "the folder of the images", "check the path"
        )
    if is_hub:
        return Source(name, folder, table=_table(name))
    require_file(path, _SOURCES)
    if path.suffix.lower() not in (".json", ".jsonl"):
        raise DataError(printable(path), f"a file of type {path.suffix or '(none)'}", _SOURCES, "convert it")
    return Source(name, folder, file=path)


def read_records(name: str, image_folder: Path | None = None) -> Records:
    """Return all records of a source; arguments and errors as of `open_source`.

    Raises:
        DataError: a file is not UTF-8, not JSON, or no list; or there is no record.
    """
    source = open_source(name, image_folder)
    records = source.records(source.places())
    if not len(records):
        raise DataError(printable(name), "no records", "at least one", "check the contents")
    return records


def _table(name: str) -> Any:
    table = load_hub(name)
    if "conversations" not in table.column_names:
        found = ", ".join(table.column_names)
        raise DataError(name, f"the columns {found}", "a column conversations", "take a data set in LLaVA's format")
    return table.select_columns([column for column in ("image", "conversations") if column in table.column_names])


class _StoredRows(Sequence[Any]):
    """Rows of a `datasets.Dataset` as they are stored: images stay bytes or paths."""

    def __init__(self, table: Any) -> None:
        feature = table.features.get("image")
        feature = getattr(feature, "feature", feature)  # of a list
        self._names_files = type(feature).__name__ == "Image"
        self._table = table.with_format("arrow")

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: Any) -> Any:
        return self._table[index].to_pylist()[0]

    def image(self, value: dict[str, Any], index: int, position: int) -> ImageSource:
        """Return an image that is stored in its row, or in a file that the library keeps for it.

        Raises:
            BadSample: it is neither; a record's own words name no file outside the image folder.
        """
        if isinstance(value.get("bytes"), bytes):
            return TableImage(self, index, position)
        if self._names_files and isinstance(value.get("path"), str):
            return ImageFile(Path(value["path"]))
        raise BadSample(f"image is {shown(value)}, without bytes")


def _turns(value: Any) -> tuple[tuple[Turn, ...], tuple[Mended, ...]]:
    """Return the turns of a record, checked for speakers, order and answers, and whether one was left out."""
    if not isinstance(value, list) or not value:
        raise BadSample("no list of turns in `conversations`")
    opening = 1 if _role(value[0]) == "system" else 0
    left_out = len(value) > opening and _role(value[opening]) == "assistant"
    numbered = [(number, item) for number, item in enumerate(value, start=1) if not left_out or number != opening + 1]
    turns = tuple(_turn(item, number) for number, item in numbered)
    for at, turn in enumerate(turns[opening:]):
        expected = ("user", "assistant")[at % 2]
        if turn.role != expected:
            number = numbered[opening + at][0]
            raise BadSample(f"turn {number} is the {turn.role}'s, where the {expected} should speak")
    if not turns[opening:] or turns[-1].role != "assistant":
        raise BadSample("no answer to the last turn")
    return turns, (FIRST_BY_MODEL,) if left_out else ()


def _placed(
    turns: tuple[Turn, ...], images: tuple[ImageSource, ...]
) -> tuple[tuple[Turn, ...], tuple[ImageSource, ...], tuple[Mended, ...]]:
    """Return turns and images that fit each other: one `<image>` for each, or none at all."""
    named = sum(turn.text.count(IMAGE) for turn in turns)
    if not images:
        return turns, images, (IMAGE_IS_TEXT,) if named else ()
    if not named:
        return turns, (), (IMAGE_NOT_SHOWN,)
    for number, turn in enumerate(turns, start=1):
        if turn.role != "user" and IMAGE in turn.text:
            raise BadSample(f"{IMAGE} in turn {number}, which is the {turn.role}'s")
    if named > len(images):
        turns = tuple(Turn(turn.role, _once(turn.text)) for turn in turns)
    if sum(turn.text.count(IMAGE) for turn in turns) != len(images):
        raise BadSample(f"{named} {IMAGE} in the text for {len(images)} images")
    return turns, images, (IMAGE_REPEATED,) if named > len(images) else ()


def _once(text: str) -> str:
    """Return a text with the first of its `<image>` alone."""
    before, image, behind = text.partition(IMAGE)
    return before + image + behind.replace(IMAGE, "")


def _role(item: Any) -> Role | None:
    name = item.get("from") if isinstance(item, dict) else None
    return _ROLES.get(name) if isinstance(name, str) else None


def _turn(item: Any, number: int) -> Turn:
    name, value = (item.get("from"), item.get("value")) if isinstance(item, dict) else (None, None)
    if not isinstance(name, str) or not isinstance(value, str):
        raise BadSample(f"turn {number} has not the two strings `from` and `value`")
    role = _ROLES.get(name)
    if role is None:
        raise BadSample(f"unknown speaker {name!r:.40} in turn {number} (known: {', '.join(_ROLES)})")
    text = value.strip()
    if not text:
        raise BadSample(f"empty {'answer' if role == 'assistant' else 'text'} in turn {number}")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair; no tokenizer takes it
        raise BadSample(f"turn {number} holds text that is not Unicode") from error
    return Turn(role, text)
