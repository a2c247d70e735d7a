"""What users and their records name: paths, JSON and words, none of which need be what they seem.

A path is opened only where a regular file is: reading a pipe would wait for ever, a device never ends. JSON may be
nested deeper than the parser goes, and spell text that no terminal can show.
"""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

from eqat_mm.errors import DataError

NO_FILE = "no such file or folder"
_TOLD = 400
"""Characters of a library's error in a message."""


def user_path(source: str, allowed: str) -> Path:
    """Return the path that `source` names, `~` expanded.

    Raises:
        DataError: it names nothing, or the home of nobody.
    """
    if not source:
        raise DataError("a source of data", "no name", allowed, "name one")
    try:
        return Path(source).expanduser()
    except (RuntimeError, ValueError) as error:
        raise DataError(printable(source), str(error), allowed, "check the path") from error


def fault_of(path: Path) -> str | None:
    """Return what keeps a path from being read as a file; None where it is a regular file, or a link to one."""
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return NO_FILE
    except (OSError, ValueError) as error:  # ValueError: characters that no path has
        return str(error)
    if stat.S_ISDIR(mode):
        return "a folder"
    return None if stat.S_ISREG(mode) else "a pipe, a socket or a device"


def require_file(path: Path, allowed: str) -> None:
    """Raise `DataError` unless a regular file is at `path`."""
    fault = fault_of(path)
    if fault is not None:
        raise DataError(printable(path), fault, allowed, "check the path")


def read_bytes(path: Path, allowed: str) -> bytes:
    """Return the contents of a regular file.

    Raises:
        DataError: there is none, or it cannot be read.
    """
    require_file(path, allowed)
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(printable(path), str(error), "a file that can be read", "check it and its rights") from error


def decode_utf8(data: bytes, path: Path, *, first_line: int = 1) -> str:
    """Return text without a byte order mark.

    Raises:
        DataError: it is not UTF-8; names the line, counted from `first_line`.
    """
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # error.object, not data: the offset does not count a byte order mark
        line = first_line + error.object.count(b"\n", 0, error.start)
        raise not_utf8(f"{path}, line {line}", error) from error


def not_utf8(where: str, error: UnicodeError) -> DataError:
    """Return the error for text in another encoding."""
    return DataError(printable(where), printable(error), "text in UTF-8", "convert the file to UTF-8")


def parse_json(text: str, where: str, allowed: str) -> Any:
    """Return what a JSON text holds.

    Raises:
        DataError: it is none, holds a number of thousands of digits, or is nested too deep.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise DataError(printable(where), "JSON nested too deep", allowed, "mend or fetch it again") from error
    except ValueError as error:
        raise DataError(printable(where), f"not JSON: {error}", allowed, "mend or fetch it again") from error


def printable(value: object) -> str:
    """Return a value as text that UTF-8 can hold: half surrogates, as in odd file names, are spelt out."""
    return str(value).encode(errors="backslashreplace").decode()


def shown(value: object) -> str:
    """Return a value out of a record for a message: what is short as it is, of the rest its type."""
    if value is None or isinstance(value, str | int | float):
        return f"{value!r:.60}"
    return f"a {type(value).__name__}"


def told(error: Exception) -> str:
    """Return an error of a library for a message, its class included: many have no words."""
    return printable(f"{type(error).__name__}: {error}")[:_TOLD]
