"""The index of a source: what is known of each record, in one file that every process maps into its memory."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from eqat_mm.data.image_text.conversations import MENDED
from eqat_mm.data.image_text.inspection import Finding
from eqat_mm.data.image_text.problems import KINDS, BadSample, MissingImage, UnreadableImage
from eqat_mm.data.image_text.record_files import Places
from eqat_mm.runtime.files import atomic_path

Array = NDArray[Any]


@dataclass(frozen=True)
class Index:
    """What is known of n records about m images.

    Attributes:
        starts: first byte of each record in its file, int64 [n].
        sizes: bytes of each record, int64 [n].
        numbers: of each record in messages, int64 [n].
        contents: hash of what each record says, int64 [n].
        lengths: tokens, int32 [n]; 0 where they were not counted.
        kinds: what is wrong with each record, uint8 [n]: 0 for nothing, else 1 + its place in `problems.KINDS`.
        cuts: whether a record that is too long may be cut, bool [n].
        mended: in what each record departs from the format, uint8 [n], a bit for each of `conversations.MENDED`.
        owners: the record of each image that is shown, int32 [m], ascending.
        images: hash of the name of each image, int64 [m].
        image_sizes: height and width in pixels, int32 [m, 2].
        problems: lines of JSON as bytes, uint8: `index`, and what is wrong in words.
    """

    starts: Array
    sizes: Array
    numbers: Array
    contents: Array
    lengths: Array
    kinds: Array
    cuts: Array
    mended: Array
    owners: Array
    images: Array
    image_sizes: Array
    problems: Array

    def __len__(self) -> int:
        return len(self.starts)

    @property
    def places(self) -> Places:
        """Where the records are."""
        return Places(self.starts, self.sizes, self.numbers)

    @property
    def shown(self) -> Array:
        """How many images each record shows, int64 [n]."""
        return np.bincount(self.owners, minlength=len(self))

    def of_kind(self, *kinds: type[BadSample]) -> Array:
        """Return the records with problems of some kinds, int64."""
        return np.flatnonzero(np.isin(self.kinds, [1 + KINDS.index(kind) for kind in kinds]))

    @property
    def without_images(self) -> Array:
        """The records whose images were missing or unreadable, int64."""
        return self.of_kind(MissingImage, UnreadableImage)

    def words(self) -> dict[int, str]:
        """Return what is wrong with records, in words."""
        lines = map(json.loads, self.problems.tobytes().splitlines())
        return {line["index"]: line["problem"] for line in lines}

    def save(self, path: Path, stamp: str) -> None:
        """Write it to a file, whole or not at all, with the stamp of its source."""
        columns = {field.name: np.ascontiguousarray(getattr(self, field.name)) for field in fields(self)}
        with atomic_path(path) as temporary:
            save_file(columns, temporary, {"stamp": stamp})

    @classmethod
    def open(cls, path: Path) -> Index | None:
        """Map the index in a file; None where there is none, or none that is whole."""
        try:
            with safe_open(path, "pt") as file:  # torch's tensors are maps of the file, numpy's would be copies
                return cls(**{field.name: file.get_tensor(field.name).numpy() for field in fields(cls)})
        except (OSError, SafetensorError):
            return None

    def corrected(self, records: Sequence[int], findings: Sequence[Finding]) -> Index:
        """Return the index with other findings about some records."""
        new = collected(self.places.of(records), findings)
        columns = {name: getattr(self, name).copy() for name in ("contents", "lengths", "kinds", "cuts", "mended")}
        for name, column in columns.items():
            column[list(records)] = getattr(new, name)
        kept = ~np.isin(self.owners, records)
        owners = np.concatenate([self.owners[kept], np.asarray(records, np.int32)[new.owners]])
        order = np.argsort(owners, kind="stable")
        for name in ("images", "image_sizes"):
            columns[name] = np.concatenate([getattr(self, name)[kept], getattr(new, name)])[order]
        again = {records[at]: words for at, words in new.words().items()}
        words = {at: words for at, words in self.words().items() if at not in set(records)} | again
        return replace(self, **columns, owners=owners[order], problems=_lines(words))


def collected(places: Places, findings: Sequence[Finding]) -> Index:
    """Return the index of records with these findings."""
    images = [(at, image) for at, finding in enumerate(findings) for image in finding.images]
    problems = {at: str(finding.problem) for at, finding in enumerate(findings) if finding.problem is not None}
    return Index(
        *places,
        contents=np.array([finding.content for finding in findings], np.int64),
        lengths=np.array([finding.length for finding in findings], np.int32),
        kinds=np.array([_kind(finding.problem) for finding in findings], np.uint8),
        cuts=np.array([finding.cuts for finding in findings], np.bool_),
        mended=np.array([sum(1 << MENDED.index(each) for each in finding.mended) for finding in findings], np.uint8),
        owners=np.array([at for at, _ in images], np.int32),
        images=np.array([image.number for _, image in images], np.int64),
        image_sizes=np.array([image.size for _, image in images], np.int32).reshape(-1, 2),
        problems=_lines(problems),
    )


def joined(parts: Sequence[Index]) -> Index:
    """Return the index of all records of several, in this order."""
    firsts = np.cumsum([0, *map(len, parts)])
    owners = [part.owners + first for part, first in zip(parts, firsts[:-1], strict=True)]
    words = {
        int(first) + at: said
        for part, first in zip(parts, firsts[:-1], strict=True)
        for at, said in part.words().items()
    }
    columns = {field.name: np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(Index)}
    return Index(**columns | {"owners": np.concatenate(owners).astype(np.int32), "problems": _lines(words)})


def _kind(problem: BadSample | None) -> int:
    return 0 if problem is None else 1 + KINDS.index(type(problem))


def _lines(words: dict[int, str]) -> Array:
    lines = "".join(json.dumps({"index": index, "problem": said}) + "\n" for index, said in words.items())
    return np.frombuffer(lines.encode(), np.uint8)
