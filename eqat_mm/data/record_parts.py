"""Records that several processes write, bit by bit, and that become one file when all are there.

Each process appends to a file of its own in a hidden folder beside the output, one JSON object a line; whoever writes
the last record puts them together. A process that is killed leaves at most half a line, which does not count. Records
are known by their `index`; which process wrote one does not matter, so a run may go on with more or fewer processes.
"""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from eqat_mm.data.text_files import package_missing
from eqat_mm.runtime.files import append_jsonl, atomic_path, write_jsonl

Record = dict[str, Any]

SUFFIXES = (".jsonl", ".parquet")
"""Types of file that records can be put into."""


def parts_folder(output: Path) -> Path:
    """Return the folder of the unfinished output; hidden, so that no folder of texts takes it for text."""
    return output.with_name(f".{output.name}.parts")


class Part:
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
        append_jsonl(self._path, record)


def read_parts(folder: Path) -> dict[int, Record]:
    """Return the records of all parts by index, in ascending order; half lines are left out."""
    records = (record for path in sorted(folder.glob("*.jsonl")) for record in _whole_lines(path))
    return dict(sorted((record["index"], record) for record in records))


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
    with (folder / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _whole_lines(path: Path) -> Iterator[Record]:
    with path.open("rb") as file:
        for line in file:
            try:
                record = json.loads(line)
            except ValueError:  # cut within the line, or within a character
                continue
            if isinstance(record, dict):
                yield record
