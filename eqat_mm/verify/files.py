"""Files against the hashes that were written last."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from eqat_mm.runtime.files import sha256_of
from eqat_mm.runtime.progress import progress
from eqat_mm.verify.checks import Check


def file_checks(folder: Path, digests: Mapping[str, str], recorded_in: str) -> Iterator[Check]:
    """Yield a check for every file that is not as it was written, and one of all."""
    bad = 0
    for name, digest in progress(digests.items(), what="hash", total=len(digests), unit="file"):
        path = folder / name
        given = sha256_of(path) if path.is_file() else None
        if given != digest:
            bad += 1
            yield Check("file", False, f"{name}: {'missing' if given is None else 'altered: not the SHA-256 it had'}")
    if not bad:
        yield Check("files", True, f"{len(digests)} as written, by the SHA-256 in {recorded_in}")
