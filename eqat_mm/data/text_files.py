"""Documents out of one file: plain text, JSON lines or parquet, each record checked.

Shared with the hub reader: a record's text must be a string that UTF-8 can hold, a source must have
a column `text` and at least one document that is not blank.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from eqat_mm.errors import ConfigError, DataError

SOURCES = "a .txt, .jsonl or .parquet file, a folder of them, hf:NAME[:CONFIG[:SPLIT]] or demo-wikipedia"
_DOCUMENT_GAP = re.compile(r"\n(?:[ \t]*\n){2,}")


def read_text_file(path: Path) -> list[str]:
    """Return the documents of one file, stripped, without the blank ones.

    Raises:
        DataError: no such file, another type of file, not UTF-8, no `text` string in a record, or
            no text at all; the message names the file and the line or row.
        ConfigError: pyarrow is not installed and the file is a parquet file.
    """
    reader = _READERS.get(path.suffix.lower())
    if not path.is_file():
        raise DataError(str(path), "no such file or folder", SOURCES, "check the path")
    if reader is None:
        raise DataError(str(path), f"a file of type {path.suffix or '(none)'}", SOURCES, "convert it")
    return without_blank(str(path), reader(path))


def _read_txt(path: Path) -> Iterator[str]:
    text = _decode(path.read_bytes(), str(path), first_line=1)
    yield from _DOCUMENT_GAP.split(text.replace("\r\n", "\n"))


def _read_jsonl(path: Path) -> Iterator[str]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            where = f"{path}, line {number}"
            text = _decode(line, str(path), first_line=number)
            if text.strip():
                yield _text_of(_parse_json(text, where), where)


def _read_parquet(path: Path) -> Iterator[str]:
    try:
        import pyarrow as arrow
        from pyarrow import parquet
    except ImportError as error:
        raise package_missing(str(path), "pyarrow") from error
    try:
        with parquet.ParquetFile(path) as file:
            require_column(file.schema_arrow.names, str(path))
            column = file.read(columns=["text"]).column("text")
    except (arrow.ArrowException, OSError) as error:
        raise DataError(str(path), str(error), "a readable parquet file", "write it again") from error
    for row, scalar in enumerate(column):
        where = f"{path}, row {row}"
        try:
            value = scalar.as_py()
        except UnicodeDecodeError as error:
            raise _not_utf8(where, error) from error
        yield require_text(value, where)


def _decode(data: bytes, path: str, *, first_line: int) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # error.object, not data: the offset does not count a byte order mark
        line = first_line + error.object.count(b"\n", 0, error.start)
        raise _not_utf8(f"{path}, line {line}", error) from error


def _parse_json(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(where, f"not JSON: {error}", "one JSON object per line", "mend the line") from error


def _text_of(record: Any, where: str) -> str:
    if not isinstance(record, dict):
        raise DataError(where, f"a JSON {type(record).__name__}", "an object with field text", "mend the line")
    require_column(list(record), where)
    return require_text(record["text"], where)


def require_column(names: list[str], where: str) -> None:
    """Raise `DataError` unless `text` is among the fields or columns `names`."""
    if "text" not in names:
        found = ", ".join(names) or "nothing"
        raise DataError(where, f"the fields {found}", "a field named text", "rename the field with the text")


def require_text(value: object, where: str) -> str:
    """Return `value` if it is a string that UTF-8 can hold, else raise `DataError`."""
    if not isinstance(value, str):
        raise DataError(where, f"text is {type(value).__name__}", "a string", "mend or remove the record")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair; no tokenizer takes it
        raise _not_utf8(where, error) from error
    return value


def without_blank(source: str, documents: Iterable[str]) -> list[str]:
    """Return the documents stripped, without the blank ones; `DataError` if none is left."""
    kept = [stripped for document in documents if (stripped := document.strip())]
    if not kept:
        raise DataError(source, "no text", "at least one document that is not blank", "check the contents")
    return kept


def _not_utf8(where: str, error: UnicodeError) -> DataError:
    return DataError(where, str(error), "text in UTF-8", "convert the file to UTF-8")


def package_missing(where: str, package: str) -> ConfigError:
    """Return the error for an optional package that `where` needs."""
    return ConfigError(where, f"{package} is not installed", f"{package} installed", f"pip install {package}")


_READERS = {".txt": _read_txt, ".jsonl": _read_jsonl, ".parquet": _read_parquet}
SUFFIXES = tuple(_READERS)
