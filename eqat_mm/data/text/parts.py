"""Parts of a large text, each of which can be read without the others, and documents drawn from them.

A part is a stretch of an uncompressed file, a group of rows of a parquet file, a compressed file (from its beginning),
or a shard of a data set of the hub. Parts are drawn by a seed; of a few that are open, each gives one document in turn.
So as much is read as is taken, from many places, and the same every time.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path

import torch

from eqat_mm.data.text.files import LONGEST, documents_in, groups_in, is_compressed, kind_of
from eqat_mm.runtime.seeding import generator

Piece = Callable[[], Iterator[str]]
"""Called, it yields documents, blank ones among them."""

STRETCH = 2**18
"""Bytes of a part of an uncompressed file."""
_OPEN = 16
"""Parts that are read at once."""


class PiecesOfFiles(Sequence[Piece]):
    """Parts of files; which bytes of which file is only worked out when a part is asked for.

    Args:
        files: that `require_text_file` has let pass.
        field: that holds the text, where there are records.
    """

    def __init__(self, files: Sequence[Path], field: str) -> None:
        self.files, self.field = files, field
        self._ends = list(accumulate(_parts_in(file) for file in files))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Piece:  # type: ignore[override]
        """Return one part."""
        which = bisect_right(self._ends, index)
        path, inside = self.files[which], index - (self._ends[which - 1] if which else 0)
        if is_compressed(path):
            return lambda: documents_in(path, self.field)
        unit = 1 if kind_of(path) == ".parquet" else STRETCH
        return lambda: documents_in(path, self.field, inside * unit, (inside + 1) * unit)


def _parts_in(path: Path) -> int:
    if is_compressed(path):
        return 1
    if kind_of(path) == ".parquet":
        return groups_in(path)
    return -(-path.stat().st_size // STRETCH)


def drawn(parts: Sequence[Piece], seed: int) -> Iterator[str]:
    """Yield documents, stripped and not blank, from parts in an order that `seed` decides, until there are no more."""
    order = torch.randperm(len(parts), generator=generator(seed, "parts of a text")).tolist()
    waiting = (parts[index]() for index in order)
    in_turn = deque(stream for _, stream in zip(range(_OPEN), waiting, strict=False))
    while in_turn:
        stream = in_turn.popleft()
        document = next(stream, None)
        if document is None:
            in_turn.extend(stream for _, stream in zip(range(1), waiting, strict=False))
            continue
        in_turn.append(stream)
        if stripped := document[:LONGEST].strip():
            yield stripped
