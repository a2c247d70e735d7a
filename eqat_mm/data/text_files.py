"""Documents out of one file: plain text, JSON lines or parquet, each record checked.

Shared with the hub reader: a record's text must be a string that UTF-8 can hold, a source must have
a column `text` and at least one document that is not blank.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from eqat_mm.data.user_files import (
    decode_utf8,
    not_utf8,
    parse_json,
    printable,
    read_bytes,
    require_file,
    told,
)
from eqat_mm.errors import ConfigError, DataError, EqatError

SOURCES = "a .txt, .jsonl or .parquet file, a folder of them, hf:NAME[:CONFIG[:SPLIT]] or demo-wikipedia"
_NAMED = 10  # fields in a message
_DOCUMENT_GAP = re.compile(r"\n(?:[ \t]*\n){2,}")


def read_text_file(path: Path) -> list[str]:
    """Return the documents of one file, stripped, without the blank ones.

    Raises:
        DataError: no such file, another type of file, not UTF-8, no `text` string in a record, or
            no text at all; the message names the file and the line or row.
        ConfigError: pyarrow is not installed and the file is a parquet file.
    """
    reader = _READERS.get(path.suffix.lower())
    require_file(path, SOURCES)
    if reader is None:
        raise DataError(printable(path), f"a file of type {path.suffix or '(none)'}", SOURCES, "convert it")
    return without_blank(str(path), reader(path))


def _read_txt(path: Path) -> Iterator[str]:
    text = decode_utf8(read_bytes(path, SOURCES), path)
    yield from _DOCUMENT_GAP.split(text.replace("\r\n", "\n"))


def _read_jsonl(path: Path) -> Iterator[str]:
    with readable(str(path), "a file that can be read"), path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            where = f"{path}, line {number}"
            text = decode_utf8(line, path, first_line=number)
            if text.strip():
                yield _text_of(parse_json(text, where, "one JSON object per line"), where)


def _read_parquet(path: Path) -> Iterator[str]:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise package_missing(str(path), "pyarrow") from error
    with readable(str(path), "a readable parquet file"), parquet.ParquetFile(path) as file:
        require_column(file.schema_arrow.names, str(path))
        column = file.read(columns=["text"]).column("text")
    for row, scalar in enumerate(column):
        where = f"{path}, row {row}"
        with readable(where, "a readable parquet file"):
            value = scalar.as_py()
        yield require_text(value, where)


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


def _text_of(record: Any, where: str) -> str:
    if not isinstance(record, dict):
        raise DataError(
            printable(where), f"a JSON {type(record).__name__}", "an object with field text", "mend the line"
        )
    require_column(record, where)
    return require_text(record["text"], where)


def require_column(names: Iterable[str], where: str) -> None:
    """Raise `DataError` unless `text` is among the fields or columns `names`, and only once."""
    names = list(names)
    if names.count("text") != 1:
        found = printable(", ".join(names[:_NAMED])) or "nothing"
        more = ", ..." if len(names) > _NAMED else ""
        raise DataError(
            printable(where), f"the fields {found}{more}", "one field named text", "rename the field with the text"
        )


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


_READERS = {".txt": _read_txt, ".jsonl": _read_jsonl, ".parquet": _read_parquet}
SUFFIXES = tuple(_READERS)
