"""Text as documents: the unit that is split into training and held-out text.

A window of tokens cut from the middle of an article knows its neighbours, so windows must never be
split; documents are. Which side a document falls on depends on its own words and the seed alone.

Sources
- a `.txt` file: two or more blank lines in a row separate documents; a single blank line separates
  paragraphs of one document. A file without such a gap is one document.
- a `.jsonl` file, or a `.json` file of the same form: one object per line, the document in its field `text`, or
  another that is named. Blank lines are skipped.
- one of these compressed, `.gz` or `.zst`.
- a `.parquet` file: one document per row of its column `text`, or another that is named.
- a folder: every such file below it, in the order of their paths; hidden files are ignored, and so are `.json` files
  beside others, which mostly describe them.
- `hf:NAME[:CONFIG[:SPLIT]]`: a Hugging Face data set, column `text` (see `eqat_mm.data.hub`).
- a name that an installed package registered (see `eqat_mm.runtime.plugins`), such as the demo's `demo-wikipedia`.

Where a number of windows is asked for, of a data set of the hub or of files of more than 256 MiB only what is drawn is
read (see `eqat_mm.data.text.parts`). Everything else is read whole.

Records that hold only white space are skipped (published corpora are full of them); a file or data
set in which nothing else is left is an error.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from eqat_mm.data.hub import HUB_PREFIX, is_slice, load_hub, shards_of
from eqat_mm.data.text.files import (
    SOURCES,
    TEXT_FIELD,
    is_compressed,
    kind_of,
    read_text_file,
    readable,
    require_column,
    require_text,
    require_text_file,
    without_blank,
)
from eqat_mm.data.text.parts import Piece, PiecesOfFiles, drawn
from eqat_mm.data.user_files import printable, user_path
from eqat_mm.errors import ConfigError, DataError
from eqat_mm.runtime.plugins import TEXTS, plugged, plugged_function
from eqat_mm.runtime.progress import say, size
from eqat_mm.runtime.seeding import derive_seed

_WHOLE = 2**28
"""Bytes of text that are read whole."""
_PACKED = 4
"""Text is so many times its compressed size, about."""


def load_documents(source: str, field: str = TEXT_FIELD) -> list[str]:
    """Return the documents of `source` in their stored order; see the module for what it may be.

    Args:
        source: where they are.
        field: that holds the text, where there are records.

    Raises:
        DataError: the source is missing, empty, not UTF-8, or lacks a string of text; the message
            names the file and the line or row.
        ConfigError: an optional package that this source needs is not installed.
    """
    if source in plugged(TEXTS):
        documents = plugged_function(TEXTS, source)()
        return [require_text(text, f"{source}, document {at}") for at, text in enumerate(documents)]
    if source.startswith(HUB_PREFIX):
        return _read_hub(source, field)
    return [document for file in _files_of(source) for document in read_text_file(file, field)]


def drawn_documents(source: str, field: str, seed: int) -> Iterator[str] | None:
    """Return documents drawn from a text that is not to be read whole, as far as they are asked for.

    Args:
        source: where they are; its size is said.
        field: that holds the text, where there are records.
        seed: of the draw.

    Returns:
        Documents, stripped and not blank; None where the text is small.

    Raises:
        DataError: as `load_documents`.
        ConfigError: as `load_documents`.
    """
    if source.startswith(HUB_PREFIX):
        return None if is_slice(source) else drawn(shards_of(source, field), seed)
    files = [] if source in plugged(TEXTS) else _files_of(source)
    for file in files:
        require_text_file(file)
    if sum(_bytes_in(file) for file in files) <= _WHOLE:
        return None
    stored = size(sum(file.stat().st_size for file in files))
    say(f"text: {source}, {len(files):,} files, {stored}; only what is drawn is read")
    parts: Sequence[Piece] = PiecesOfFiles(files, field)
    return drawn(parts, seed)


def _bytes_in(file: Path) -> int:
    with readable(str(file), "a file that can be read"):
        return file.stat().st_size * (_PACKED if is_compressed(file) or kind_of(file) == ".parquet" else 1)


def of_side(documents: Iterable[str], held_out: bool, fraction: float, seed: int) -> Iterator[str]:
    """Yield the documents of one side of the split, see `split_documents`."""
    bound = fraction * 2**63
    return (document for document in documents if (_content_hash(document, seed) < bound) is held_out)


def split_documents(documents: list[str], held_out_fraction: float, seed: int) -> tuple[list[str], list[str]]:
    """Split documents into (training, held out), each in the order given.

    A document is held out when a hash of (seed, its words) falls into the lowest
    `held_out_fraction` of the hash range. So the side of a document depends neither on the other
    documents nor on their order, copies of it are always together, and a larger fraction holds out
    a superset. The share that is held out is therefore only about `held_out_fraction`.

    Raises:
        ConfigError: `held_out_fraction` is not in [0, 1).
        DataError: one side would be empty (a fraction of 0 holds out nothing and is allowed).
    """
    if not 0 <= held_out_fraction < 1:
        raise ConfigError(
            "held_out_fraction",
            str(held_out_fraction),
            "0 (hold out nothing) up to, but not including, 1",
            "use 0.1 to hold out about a tenth of the documents",
        )
    bound = held_out_fraction * 2**63
    sides: tuple[list[str], list[str]] = ([], [])
    for document in documents:
        sides[_content_hash(document, seed) < bound].append(document)
    if not sides[0] or (held_out_fraction > 0 and not sides[1]):
        raise DataError(
            "the split into training and held-out documents",
            f"{len(sides[0])} training and {len(sides[1])} held-out of {len(documents)} documents",
            "at least one document on either side",
            "give more documents, or take all of them: `part: all` (--calibration.part all, --data.part all)",
        )
    return sides


def _content_hash(document: str, seed: int) -> int:
    # White space is no content: the same article saved with other line breaks stays on its side.
    return derive_seed(seed, "held-out documents", " ".join(document.split()))


def _files_of(source: str) -> list[Path]:
    path = user_path(source, SOURCES)
    return _files_below(path) if os.path.isdir(path) else [path]


def _files_below(folder: Path) -> list[Path]:
    with readable(str(folder), "a folder that can be read"):
        files = sorted(path for path in folder.rglob("*") if _is_text(path, folder) and os.path.isfile(path))
    files = [file for file in files if file.suffix.lower() != ".json"] or files
    if not files:
        raise DataError(printable(folder), "no text file below this folder", SOURCES, "check the path")
    return files


def _is_text(path: Path, folder: Path) -> bool:
    hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
    return kind_of(path) is not None and not hidden


def _read_hub(source: str, field: str) -> list[str]:
    table = load_hub(source)
    require_column(table.column_names, source, field)
    with readable(source, "a readable data set"):
        return without_blank(
            source, (require_text(value, f"{source}, row {row}") for row, value in enumerate(table[field]))
        )
