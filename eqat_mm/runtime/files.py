"""Files that exist whole or not at all: temporary name, fsync, rename."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from eqat_mm.errors import CheckpointError

UNFINISHED = ".*.partial"
"""Pattern of the temporary names: what a killed process left behind."""

_SAMPLES, _SAMPLE = 64, 2**16
_CHUNK = 2**23


def cache_folder() -> Path:
    """Folder of what can be made again: `$EQAT_CACHE`, by default `~/.cache/eqat-mm`."""
    return Path(os.environ.get("EQAT_CACHE") or "~/.cache/eqat-mm").expanduser()


def remove_unfinished(path: Path) -> None:
    """Remove what killed processes have left of a file or folder `path`, and in it, where nobody else is writing."""
    for left in (*path.parent.glob(f".{path.name}.*partial"), *path.glob(UNFINISHED)):
        remove(left)


def remove(path: Path) -> None:
    """Remove a file, a link, or a folder with what is in it; nothing where there is none."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it is fsynced and renamed to `path`.

    The name is this call's own. On any exception the temporary file is removed and `path` is left as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        yield temporary
        fsync(temporary)
        os.replace(temporary, path)
        fsync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write `text` atomically (UTF-8)."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write `value` atomically as indented JSON with a trailing newline; raises `ValueError` for NaN: JSON has none."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file (UTF-8); raises `OSError` or `json.JSONDecodeError`."""
    return json.loads(path.read_text(encoding="utf-8"))


def write_jsonl(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """Write records atomically, one JSON object a line."""
    write_text(path, "".join(_line(record) for record in records))


def append_jsonl(path: Path, record: dict[str, Any]) -> None:
    """Append one JSON record as a line; the line is written with a single call and flushed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(_line(record))


def sha256_of(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checksum_of(path: Path) -> str:
    """Return a checksum of a file of any size: CRC-32 of each 8 MiB, on all cores, so that it is as fast as the disk.

    It notices what disks and interrupted copies do, not what somebody does on purpose.
    """
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        sums = pool.map(lambda start: zlib.crc32(_bytes(path, start, _CHUNK)), range(0, path.stat().st_size, _CHUNK))
        return hashlib.sha256(repr((path.stat().st_size, list(sums))).encode()).hexdigest()


def fingerprint_of(paths: Iterable[Path]) -> str:
    """Return a hash by which changed files are noticed, from their names, sizes and contents.

    Files above 4 MiB are not read whole, but in 64 places, first and last bytes among them: other weights differ
    everywhere, and hundreds of gigabytes need not be read to see that they are the same.
    """
    found = hashlib.sha256()
    for path in sorted(paths, key=lambda path: path.name):
        size = path.stat().st_size
        found.update(repr((path.name, size)).encode())
        if size <= _SAMPLES * _SAMPLE:
            found.update(path.read_bytes())
            continue
        for sample in range(_SAMPLES):
            found.update(_bytes(path, (size - _SAMPLE) * sample // (_SAMPLES - 1), _SAMPLE))
    return found.hexdigest()


def _bytes(path: Path, start: int, count: int) -> bytes:
    with path.open("rb") as file:
        file.seek(start)
        return file.read(count)


def fsync(path: Path) -> None:
    """Wait until what was written to a file, or the names in a folder, would survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n"


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a JSON file of a model folder that holds an object.

    Raises:
        CheckpointError: it cannot be read, is not JSON in UTF-8, is nested too deep, or holds something else.
    """
    try:
        if not path.is_file():  # opening a pipe would wait for ever
            raise FileNotFoundError("no such file")
        value = read_json(path)
    except (OSError, ValueError, RecursionError) as error:
        given = f"unreadable JSON ({type(error).__name__}: {error})"
    else:
        if isinstance(value, dict):
            return value
        given = f"{type(value).__name__} in place of an object"
    raise CheckpointError(
        where=str(path), given=given, allowed="a JSON object, {...}, in UTF-8", do="download or make the file again"
    )
