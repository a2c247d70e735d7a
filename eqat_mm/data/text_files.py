"""Documents out of one file: plain text, JSON lines or parquet, whole or compressed, each record checked.

Everything is read line by line, or batch by batch, as it is asked for, so that a file may be larger than the memory.
Shared with the hub reader: a record's text must be a string that UTF-8 can hold, a source must have a column with the
text (`text` unless another is named) and at least one document that is not blank.
"""

from __future__ import annotations

import gzip
import io
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from eqat_mm.data.user_files import decode_utf8, not_utf8, parse_json, printable, require_file, told
from eqat_mm.errors import ConfigError, DataError, EqatError

SOURCES = (
    "a .txt, .jsonl, .json (one record per line) or .parquet file, also .gz or .zst, a folder of them, "
    "hf:NAME[:CONFIG[:SPLIT]] or a name of `eqat assets`"
)
TEXT_FIELD = "text"
LONGEST = 2**20
"""Characters after which a document is cut that is drawn from a part of a text."""
_NAMED = 10  # fields in a message
_ROWS = 256
_COMPRESSED = (".gz", ".zst")


def read_text_file(path: Path, field: str = TEXT_FIELD) -> list[str]:
    """Return the documents of one file, stripped, without the blank ones.

    Args:
        path: of the file.
        field: that holds the text, where there are records.

    Raises:
        DataError: no such file, another type of file, not UTF-8, no text in a record, or no text at all; the message
            names the file and the line or row.
        ConfigError: a package is not installed that reads such a file.
    """
    require_text_file(path)
    return without_blank(str(path), documents_in(path, field))


def require_text_file(path: Path) -> None:
    """Check that a file is there and of a type that is read.

    Raises:
        DataError: it is not.
    """
    require_file(path, SOURCES)
    if kind_of(path) is None:
        raise DataError(printable(path), f"a file of type {path.suffix or '(none)'}", SOURCES, "convert it")


def kind_of(path: Path) -> str | None:
    """Return how a file is read: `.txt`, `.jsonl`, `.json` or `.parquet`, compressed or not; None where it is not."""
    suffix = path.with_suffix("").suffix if is_compressed(path) else path.suffix
    kind = suffix.lower()
    return kind if kind in (*_READERS, ".parquet") and not (kind == ".parquet" and is_compressed(path)) else None


def is_compressed(path: Path) -> bool:
    """Whether a file can be read from its beginning only."""
    return path.suffix.lower() in _COMPRESSED


def documents_in(path: Path, field: str, start: int = 0, end: int | None = None) -> Iterator[str]:
    """Yield the documents of a file, or of a part of it, as they are read, blank ones among them.

    Args:
        path: of a file that `require_text_file` has let pass.
        field: that holds the text, where there are records.
        start: of the part: the first byte, of a parquet file the first group of rows.
        end: of the part, behind its last one; None for the end of the file. A line or document belongs to the part in
            which it begins.

    Raises:
        DataError: as `read_text_file`.
        ConfigError: as `read_text_file`.
    """
    kind = kind_of(path)
    assert kind is not None
    if kind == ".parquet":
        yield from _parquet_documents(path, field, start, end)
        return
    with opened(path) as file:
        yield from _READERS[kind](_lines(file, path, start), path, field, start, end)


@contextmanager
def opened(path: Path) -> Iterator[IO[bytes]]:
    """Open a file for reading, what it holds decompressed.

    Raises:
        DataError: it cannot be read.
        ConfigError: zstandard is not installed and the file is compressed with it.
    """
    with readable(str(path), "a file that can be read"), path.open("rb") as file:
        if path.suffix.lower() == ".gz":
            with gzip.open(file) as whole:
                yield whole  # type: ignore[misc]
        elif path.suffix.lower() == ".zst":
            yield io.BufferedReader(_zstandard(path).ZstdDecompressor().stream_reader(file, read_across_frames=True))
        else:
            yield file


def _zstandard(path: Path) -> Any:
    try:
        import zstandard
    except ImportError as error:
        raise package_missing(str(path), "zstandard") from error
    return zstandard


def _lines(file: IO[bytes], path: Path, start: int) -> Iterator[tuple[int, str, bytes]]:
    """Yield byte, place for messages, and content of every line that begins at `start` or later."""
    place = 0
    if start:
        file.seek(start - 1)
        place = start - 1 + len(file.readline())
    for number, line in enumerate(file, start=1):
        yield place, f"line {number}" if not start else f"byte {place:,}", line
        place += len(line)


def _txt_documents(
    lines: Iterator[tuple[int, str, bytes]], path: Path, field: str, start: int, end: int | None
) -> Iterator[str]:
    """Yield what lies between gaps of two and more blank lines; of a later part only what is behind its first gap."""
    document: list[str] | None = None if start else []
    blank = characters = 0
    for number, (place, _, line) in enumerate(lines, start=1):
        text, beyond = decode_utf8(line, path, first_line=number), end is not None and place >= end
        blank = 0 if text.strip(" \t\r\n") else blank + 1
        if blank == 2 or (beyond and characters >= LONGEST):
            if document is not None:
                yield "".join(document)
            document, characters = [], 0
        if beyond and not document:
            return
        if document is not None:
            document.append(text.replace("\r\n", "\n"))
            characters += len(text)
    if document:
        yield "".join(document)


def _jsonl_documents(
    lines: Iterator[tuple[int, str, bytes]], path: Path, field: str, start: int, end: int | None
) -> Iterator[str]:
    for number, (place, where, line) in enumerate(lines, start=1):
        if end is not None and place >= end:
            return
        text = decode_utf8(line, path, first_line=number)
        if text.strip():
            where = f"{path}, {where}"
            yield text_of(parse_json(text, where, "one JSON object per line"), where, field)


def _parquet_documents(path: Path, field: str, start: int, end: int | None) -> Iterator[str]:
    with readable(str(path), "a readable parquet file"), _parquet(path) as file:
        require_column(file.schema_arrow.names, str(path), field)
        groups = list(range(start, file.num_row_groups if end is None else end))
        row = sum(file.metadata.row_group(group).num_rows for group in range(start))
        for batch in file.iter_batches(batch_size=_ROWS, row_groups=groups, columns=[field]):
            for scalar in batch.column(0):
                where = f"{path}, row {row}"
                with readable(where, "a readable parquet file"):
                    value = scalar.as_py()
                yield require_text(value, where)
                row += 1


def groups_in(path: Path) -> int:
    """Return how many groups of rows a parquet file has.

    Raises:
        DataError: it is none.
        ConfigError: pyarrow is not installed.
    """
    with readable(str(path), "a readable parquet file"), _parquet(path) as file:
        return int(file.num_row_groups)


def _parquet(path: Path) -> Any:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise package_missing(str(path), "pyarrow") from error
    return parquet.ParquetFile(path)


@contextmanager
def readable(source: str, allowed: str) -> Iterator[None]:
    """Turn whatever a library raises about broken data into a `DataError`: which classes differs by release."""
    try:
        yield
    except EqatError:
        raise
    except UnicodeError as error:
        raise not_utf8(source, error) from error
    except Exception as error:
        raise DataError(printable(source), told(error), allowed, "write or fetch it again") from error


def text_of(record: Any, where: str, field: str) -> str:
    """Return the text in a record.

    Raises:
        DataError: it has none.
    """
    if not isinstance(record, dict):
        raise DataError(
            printable(where), f"a JSON {type(record).__name__}", f"an object with field {field}", "mend the line"
        )
    require_column(record, where, field)
    return require_text(record[field], where)


def require_column(names: Iterable[str], where: str, field: str = TEXT_FIELD) -> None:
    """Raise `DataError` unless `field` is among the fields or columns `names`, and only once."""
    names = list(names)
    if names.count(field) != 1:
        found = printable(", ".join(names[:_NAMED])) or "nothing"
        more = ", ..." if len(names) > _NAMED else ""
        do = "name the one with the text: text_field (--calibration.text_field, --data.text_field)"
        raise DataError(printable(where), f"the fields {found}{more}", f"one field named {field}", do)


def require_text(value: object, where: str) -> str:
    """Return `value` if it is a string that UTF-8 can hold, else raise `DataError`."""
    if not isinstance(value, str):
        raise DataError(printable(where), f"text is {type(value).__name__}", "a string", "mend or remove the record")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair; no tokenizer takes it
        raise not_utf8(where, error) from error
    return value


def without_blank(source: str, documents: Iterable[str]) -> list[str]:
    """Return the documents stripped, without the blank ones; `DataError` if none is left."""
    kept = [stripped for document in documents if (stripped := document.strip())]
    if not kept:
        raise DataError(printable(source), "no text", "at least one document that is not blank", "check the contents")
    return kept


def package_missing(where: str, package: str) -> ConfigError:
    """Return the error for an optional package that `where` needs."""
    return ConfigError(where, f"{package} is not installed", f"{package} installed", f"pip install {package}")


_READERS = {".txt": _txt_documents, ".jsonl": _jsonl_documents, ".json": _jsonl_documents}
