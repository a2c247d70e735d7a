"""Sources of records: a file of any size, or a table of the hub; checked first, looked through when that is asked for.

- a `.json` file: a list of records, counted from 0 in messages.
- a `.jsonl` file: one record per line, lines counted from 1. Blank lines are skipped.
- `hf:NAME[:CONFIG[:SPLIT]]`: a Hugging Face data set with the columns of a record (see `eqat_mm.data.hub`); `image`
  holds paths or images.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from eqat_mm.data.hub import HUB_PREFIX, load_hub
from eqat_mm.data.image_text.conversations import Records
from eqat_mm.data.image_text.images import ImageFile, ImageSource, TableImage
from eqat_mm.data.image_text.problems import BadSample
from eqat_mm.data.image_text.record_files import FileRows, Places, places_in
from eqat_mm.data.user_files import printable, require_file, shown, user_path
from eqat_mm.errors import DataError
from eqat_mm.runtime.files import fingerprint_of

_SOURCES = "a .json or .jsonl file in LLaVA's format, hf:NAME[:CONFIG[:SPLIT]] or a name of `eqat assets`"


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
