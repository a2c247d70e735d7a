"""Records that several processes write, bit by bit, and that become one file when all are there.

Each process appends to a file of its own in a hidden folder beside the output, one JSON object a line; whoever writes
the last record puts them together. A process that is killed leaves at most half a line, which does not count. Records
are known by their `index`; which process wrote one does not matter, so a run may go on with more or fewer processes.
Every line carries a checksum of its record: one that was altered, or that something else wrote, is refused by name.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from eqat_mm.data.text.files import package_missing
from eqat_mm.data.user_files import require_file, shown
from eqat_mm.errors import DataError
from eqat_mm.runtime.files import append_jsonl, atomic_path, write_jsonl

Record = dict[str, Any]

_CHECKSUM = "checksum"

SUFFIXES = (".jsonl", ".parquet")
"""Types of file that records can be put into."""


def parts_folder(output: Path) -> Path:
    """Return the folder of the unfinished output; hidden, so that no folder of texts takes it for text."""
    return output.with_name(f".{output.name}.parts")


class RecordFile:
    """The records of one process.

    Args:
        folder: of all parts.
        name: of this one; no two processes share it.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self._path = folder / f"{name}.jsonl"
        if self._path.is_file() and not self._path.read_bytes().endswith(b"\n"):
            with self._path.open("ab") as file:  # so that what a killed process left does not spoil the next line
                file.write(b"\n")

    def add(self, record: Record) -> None:
        """Append a record, which has an `index`."""
        append_jsonl(self._path, record | {_CHECKSUM: _checksum(record)})


def read_parts(folder: Path, count: int) -> dict[int, Record]:
    """Return the records of all parts by index, in ascending order; half lines are left out.

    Args:
        folder: of all parts.
        count: number of records in all; an index is below.

    Raises:
        DataError: a line is not as it was written, has an index that cannot be, or tells of an index something else
            than another line does.
    """
    records: dict[int, Record] = {}
    for path in sorted(folder.glob("*.jsonl")):
        for where, record in _whole_lines(path):
            index = record["index"]
            if not isinstance(index, int) or not 0 <= index < count:
                raise _altered(where, f"a record with index {shown(index)}", f"0 to {count - 1:,}")
            if records.setdefault(index, record) != record:
                raise _altered(where, f"another record {index} than before", "one record of each index")
    return dict(sorted(records.items()))


def write_records(path: Path, records: list[Record]) -> None:
    """Write records to one file, atomically; its suffix is one of `SUFFIXES`.

    Raises:
        ConfigError: pyarrow is not installed and the file is to be a parquet file.
    """
    assert path.suffix in SUFFIXES
    if path.suffix == ".jsonl":
        write_jsonl(path, records)
        return
    require_writer(path)
    import pyarrow as arrow
    from pyarrow import parquet

    with atomic_path(path) as temporary:
        parquet.write_table(arrow.Table.from_pylist(records), temporary)


def require_writer(path: Path) -> None:
    """Check that what writes this type of file is installed.

    Raises:
        ConfigError: pyarrow is not, and it is a parquet file.
    """
    if path.suffix != ".parquet":
        return
    try:
        import pyarrow  # noqa: F401
    except ImportError as error:
        raise package_missing(str(path), "pyarrow") from error


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes on these parts out of the body; the folder is made where it is missing."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "parts.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _whole_lines(path: Path) -> Iterator[tuple[str, Record]]:
    require_file(path, "the part of a process")
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):  # cut within the line, or within a character
                continue
            where = f"{path}, line {number}"
            if not isinstance(record, dict) or "index" not in record:
                raise _altered(where, "no record", "records as they were written")
            if record.pop(_CHECKSUM, None) != _checksum(record):
                raise _altered(where, "a record that is not as it was written", "one that fits its checksum")
            yield where, record


def _checksum(record: Record) -> str:
    text = json.dumps(record, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _altered(where: str, given: str, allowed: str) -> DataError:
    return DataError(where, given, allowed, "remove this line, and its record is written again; or use --overwrite")
