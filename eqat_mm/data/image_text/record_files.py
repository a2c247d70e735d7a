"""Records in a file of any size: where each of them is, found without holding the file; one of them when asked for.

A `.json` file holds one list of records, a `.jsonl` file one record a line. Both are read once from end to end, a piece
at a time, and every record is parsed, so that what is no JSON is found before anything else is done.
"""

from __future__ import annotations

import codecs
import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from eqat_mm.data.image_text.problems import BadSample
from eqat_mm.data.user_files import decode_utf8, not_utf8, parse_json, printable, shown
from eqat_mm.errors import DataError
from eqat_mm.runtime.progress import progress

_PIECE = 2**22  # bytes
_SHORT = 8  # pieces, which take no time
_SLACK = 16
"""Characters before the end of a piece in which that end, not the file, may be what is wrong."""

_BLANK = re.compile(r"[ \t\n\r]*")

Place = tuple[int, int, int]
"""First byte, bytes, and number in messages."""


class Places(NamedTuple):
    """Where records are in a file: first bytes, bytes and numbers in messages, each int64 [records]."""

    starts: NDArray[np.int64]
    sizes: NDArray[np.int64]
    numbers: NDArray[np.int64]

    def of(self, records: Sequence[int]) -> Places:
        """Return the places of some records."""
        return Places(*(column[list(records)] for column in self))


class FileRows(Sequence[Any]):
    """Records of a file, each read and parsed when it is asked for.

    Args:
        path: of the file.
        places: of the records.
    """

    def __init__(self, path: Path, places: Places) -> None:
        self._path = path
        self._places = places
        self._descriptor: int | None = None

    def __len__(self) -> int:
        return len(self._places.starts)

    def __getitem__(self, index: Any) -> Any:
        """Return one record.

        Raises:
            BadSample: something else is in its place than when the file was looked through.
        """
        try:
            if self._descriptor is None:
                self._descriptor = os.open(self._path, os.O_RDONLY)
            size, start = int(self._places.sizes[index]), int(self._places.starts[index])
            return json.loads(os.pread(self._descriptor, size, start).decode("utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise BadSample(f"{self._path} has changed since it was looked through") from error

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_descriptor": None}

    def __del__(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)


def places_in(path: Path) -> Places:
    """Look through a `.json` or `.jsonl` file.

    Raises:
        DataError: it cannot be read, is not UTF-8, is no JSON, or holds no list.
    """
    found = (_lines if path.suffix.lower() == ".jsonl" else _elements)(path)
    flat = np.fromiter((number for place in found for number in place), np.int64).reshape(-1, 3)
    return Places(*np.ascontiguousarray(flat.T))


def _pieces(path: Path) -> Iterator[bytes]:
    """Yield a file piece by piece, the first without a byte order mark, the last empty."""
    try:
        with path.open("rb", buffering=0) as file:
            numbers = range(-(-os.fstat(file.fileno()).st_size // _PIECE))
            name = printable(f"look through {path.name}")
            for number in progress(numbers, what=name, unit=" x 4 MiB") if len(numbers) > _SHORT else numbers:
                piece = file.read(_PIECE)
                yield piece if number else piece.removeprefix(codecs.BOM_UTF8)
    except OSError as error:
        raise DataError(printable(path), str(error), "a file that can be read", "check it and its rights") from error
    yield b""


def _first_byte(path: Path) -> int:
    """Return where the text begins: behind a byte order mark."""
    with path.open("rb") as file:
        return len(codecs.BOM_UTF8) if file.read(len(codecs.BOM_UTF8)) == codecs.BOM_UTF8 else 0


def _lines(path: Path) -> Iterator[Place]:
    number = 0
    parts: list[bytes] = []
    start: int | None = None
    for piece in _pieces(path):
        start = _first_byte(path) if start is None else start
        *whole, rest = piece.split(b"\n") if piece else (b"", b"")
        for end in whole:
            line = b"".join([*parts, end])
            number += 1
            if text := decode_utf8(line, path, first_line=number).strip():
                parse_json(text, f"{path}, line {number}", "one record per line")
                yield start, len(line), number
            parts, start = [], start + len(line) + 1
        parts.append(rest)


def _elements(path: Path) -> Iterator[Place]:
    window = _Window(path)
    window.skip_blank()
    if window.next() != "[":
        raise _no_list(path, window.text[window.at : window.at + 60])
    window.advance(window.at + 1)
    window.skip_blank()
    number, more = 0, window.next() != "]"
    while more:
        window.skip_blank()
        start = window.byte
        window.advance(window.value())
        yield start, window.byte - start, number
        window.skip_blank()
        if window.next() not in (",", "]"):
            raise window.broken("Expecting ',' delimiter", window.at)
        number, more = number + 1, window.next() == ","
        if more:
            window.advance(window.at + 1)
    window.advance(window.at + 1)
    window.skip_blank()
    if window.next():
        raise window.broken("Extra data", window.at)


class _Window:
    """A stretch of a file's text that moves along; it holds what a record needs, and little more.

    Attributes:
        text: what is held.
        at: where in the text the reader is.
        byte: where in the file that is.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._pieces = _pieces(path)
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._parse = json.JSONDecoder().raw_decode
        self._ended = False
        self.text, self.at, self.byte = "", 0, 0
        self._more()
        self.byte = _first_byte(path)

    def next(self) -> str:
        """Return the next character; none at the end of the file."""
        return self.text[self.at : self.at + 1]

    def advance(self, to: int) -> None:
        """Go on to a place in the text."""
        passed = self.text[self.at : to]
        self.byte += len(passed) if passed.isascii() else len(passed.encode())
        self.at = to

    def skip_blank(self) -> None:
        """Go on to the next character that is not white space."""
        while True:
            blank = _BLANK.match(self.text, self.at)
            assert blank is not None
            self.advance(blank.end())
            if self.at < len(self.text) or self._ended:
                return
            self._more()

    def value(self) -> int:
        """Return where in the text the value ends that begins here.

        Raises:
            DataError: it is no JSON.
        """
        while True:
            try:
                _, end = self._parse(self.text, self.at)
                if end < len(self.text) - _SLACK or self._ended:  # a number may go on
                    return end
            except json.JSONDecodeError as error:
                near_the_end = error.pos >= len(self.text) - _SLACK or error.msg.startswith("Unterminated string")
                if self._ended or not near_the_end:
                    raise self.broken(error.msg, error.pos) from error
            except RecursionError as error:
                raise self._refused("JSON nested too deep") from error
            except ValueError as error:  # a number of thousands of digits
                raise self._refused(f"not JSON: {error}") from error
            for _ in range(1 + (len(self.text) - self.at) // _PIECE):  # twice as much, so that all is not read often
                self._more()

    def broken(self, problem: str, at: int) -> DataError:
        """Return the error for text that is no JSON from a place on."""
        byte = self.byte + len(self.text[self.at : at].encode())
        return self._refused(
            f"not JSON: {problem.removesuffix(' at')} at byte {byte:,}, in line {_line_at(self._path, byte):,}"
        )

    def _more(self) -> None:
        piece = next(self._pieces, b"")
        self._ended = self._ended or not piece
        try:
            more = self._decoder.decode(piece, final=self._ended)
        except UnicodeDecodeError as error:
            byte = self.byte + len(self.text[self.at :].encode()) + error.start
            raise not_utf8(f"{self._path}, line {_line_at(self._path, byte)}", error) from error
        self.text, self.at = self.text[self.at :] + more, 0

    def _refused(self, given: str) -> DataError:
        return DataError(printable(self._path), printable(given), "a list of records", "mend or fetch it again")


def _no_list(path: Path, beginning: str) -> DataError:
    lines = "; a file with one record a line is named .jsonl" if beginning.startswith("{") else ""
    return DataError(
        printable(path),
        f"no list: it begins with {printable(shown(beginning))}" if beginning else "not JSON: an empty file",
        "a list of records, [{...}, ...]",
        f"wrap the records in a list{lines}",
    )


def _line_at(path: Path, byte: int) -> int:
    """Return the number of the line in which a byte of a file is."""
    lines, left = 1, byte
    with path.open("rb") as file:
        while left > 0 and (piece := file.read(min(left, _PIECE))):
            lines, left = lines + piece.count(b"\n"), left - len(piece)
    return lines
