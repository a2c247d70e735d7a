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

from eqat_mm.data.hub import HUB_PREFIX, load_hub
from eqat_mm.data.images import ImageFile, ImageSource, TableImage, file_below
from eqat_mm.data.problems import BadSample
from eqat_mm.data.user_files import (
    decode_utf8,
    parse_json,
    printable,
    read_bytes,
    require_file,
    shown,
    told,
    user_path,
)
from eqat_mm.errors import DataError

IMAGE = "<image>"
"""What stands for an image in a human turn, whatever the model's own image token is."""

Role = Literal["system", "user", "assistant"]
_ROLES: dict[str, Role] = {
    "human": "user",
    "gpt": "assistant",
    "system": "system",
    "user": "user",
    "assistant": "assistant",
}
_SOURCES = "a .json or .jsonl file in LLaVA's format, hf:NAME[:CONFIG[:SPLIT]] or demo-easy-vqa"


class Turn(NamedTuple):
    """One turn: who speaks, and the text as it is written, white space at its ends included."""

    role: Role
    text: str


@dataclass(frozen=True)
class Conversation:
    """A record that keeps to the format.

    Attributes:
        where: file and record, for messages.
        turns: maybe one of the system, then user and assistant in turn, an assistant's last.
        images: one for every `<image>` in the turns, in this order.
    """

    where: str
    turns: tuple[Turn, ...]
    images: tuple[ImageSource, ...]


@dataclass(frozen=True)
class Records:
    """The records of one source, as stored.

    Attributes:
        source: file or data set.
        rows: dictionaries, if the source keeps to the format.
        counted: what a record is called in messages: `record`, `line` or `row`.
        numbers: the number of each record under that name.
        image_folder: paths of images are relative to it.
    """

    source: str
    rows: Sequence[Any]
    counted: str
    numbers: Sequence[int]
    image_folder: Path

    def __len__(self) -> int:
        return len(self.rows)

    def where(self, index: int) -> str:
        """Return the name of a record in messages."""
        return printable(f"{self.source}, {self.counted} {self.numbers[index]}")

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
        turns = _turns(record.get("conversations"))
        images = self._images(record.get("image"), index)
        named = sum(turn.text.count(IMAGE) for turn in turns)
        if named != len(images):
            raise BadSample(f"{named} {IMAGE} in the text for {len(images)} images")
        return Conversation(self.where(index), turns, images)

    def _images(self, value: Any, index: int) -> tuple[ImageSource, ...]:
        values = value if isinstance(value, list) else [] if value in (None, "") else [value]
        return tuple(self._image(value, index, position) for position, value in enumerate(values))

    def _image(self, value: Any, index: int, position: int) -> ImageSource:
        if isinstance(value, str) and value:
            return file_below(self.image_folder, value)
        if isinstance(value, dict) and isinstance(self.rows, _StoredRows):
            return self.rows.image(value, index, position)
        raise BadSample(f"image is {shown(value)}, not a path")


def read_records(source: str, image_folder: Path | None = None) -> Records:
    """Read the records of `source`; see the module for what it may be.

    Args:
        source: a `.json` or `.jsonl` file or a data set of the hub.
        image_folder: folder that the records' image paths are relative to. Default: that of the file, or the
            working directory for a data set of the hub.

    Raises:
        DataError: no such file, not UTF-8, not JSON, not a list, no records, or no such image folder.
        ConfigError: an optional package that this source needs is not installed.
    """
    path = user_path(source, _SOURCES)
    is_hub = source.startswith(HUB_PREFIX)
    folder = image_folder or (Path() if is_hub else path.parent)
    if not os.path.isdir(folder):
        raise DataError(
            printable(f"image folder {folder}"), "no such folder", "the folder of the images", "check the path"
        )
    records = _hub_records(source, folder) if is_hub else _file_records(path, folder)
    if not len(records):
        raise DataError(printable(source), "no records", "at least one", "check the contents")
    return records


def _hub_records(source: str, folder: Path) -> Records:
    table = load_hub(source)
    if "conversations" not in table.column_names:
        found = ", ".join(table.column_names)
        raise DataError(source, f"the columns {found}", "a column conversations", "take a data set in LLaVA's format")
    kept = [name for name in ("image", "conversations") if name in table.column_names]
    rows = _StoredRows(table.select_columns(kept))
    return Records(source, rows, "row", range(len(rows)), folder)


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


def _file_records(path: Path, folder: Path) -> Records:
    require_file(path, _SOURCES)
    if path.suffix.lower() not in (".json", ".jsonl"):
        raise DataError(printable(path), f"a file of type {path.suffix or '(none)'}", _SOURCES, "convert it")
    text = decode_utf8(read_bytes(path, _SOURCES), path)
    if path.suffix.lower() == ".jsonl":
        lines = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
        rows = [parse_json(line, f"{path}, line {number}", "one record per line") for number, line in lines]
        return Records(str(path), rows, "line", [number for number, _ in lines], folder)
    rows = parse_json(text, str(path), "a list of records")
    if not isinstance(rows, list):
        raise DataError(
            printable(path), f"a JSON {type(rows).__name__}", "a list of records", "wrap the records in a list"
        )
    return Records(str(path), rows, "record", range(len(rows)), folder)


def _turns(value: Any) -> tuple[Turn, ...]:
    """Return the turns of a record, checked for speakers, order, answers and the place of `<image>`."""
    if not isinstance(value, list) or not value:
        raise BadSample("no list of turns in `conversations`")
    turns = tuple(_turn(item, number) for number, item in enumerate(value, start=1))
    opening = 1 if turns[0].role == "system" else 0
    for number, turn in enumerate(turns[opening:], start=opening):
        expected = ("user", "assistant")[(number - opening) % 2]
        if turn.role != expected:
            raise BadSample(f"turn {number + 1} is the {turn.role}'s, where the {expected} should speak")
    if turns[-1].role != "assistant":
        raise BadSample("no answer to the last turn")
    return turns


def _turn(item: Any, number: int) -> Turn:
    if not isinstance(item, dict) or not all(isinstance(item.get(key), str) for key in ("from", "value")):
        raise BadSample(f"turn {number} has not the two strings `from` and `value`")
    role = _ROLES.get(item["from"])
    if role is None:
        raise BadSample(f"unknown speaker {item['from']!r:.40} in turn {number} (known: {', '.join(_ROLES)})")
    text = item["value"]
    if not text.strip():
        raise BadSample(f"empty {'answer' if role == 'assistant' else 'text'} in turn {number}")
    if role != "user" and IMAGE in text:
        raise BadSample(f"{IMAGE} in turn {number}, which is the {role}'s")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair; no tokenizer takes it
        raise BadSample(f"turn {number} holds text that is not Unicode") from error
    return Turn(role, text)
