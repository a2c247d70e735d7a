"""Activation streams: one tensor per sample, in RAM or in a memory-mapped file.

Samples may differ in length. On disk a stream is a plain file of numbers, whose shapes are known from the samples. What
comes out of a block goes into a file of its own; the one before stays whole until somebody removes it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from eqat_mm.errors import CheckpointError
from eqat_mm.runtime.files import atomic_path, fsync

FP, QUANTIZED = "fp", "quantized"
"""Names of the two streams."""


class Stream:
    """Hidden states [B, T, H], one tensor per sample.

    Samples are appended once, then `seal` makes the stream readable and writable.

    Args:
        dtype: of the stored numbers.
        path: memory-mapped file that holds them; None keeps them in RAM.
    """

    def __init__(self, dtype: torch.dtype, path: Path | None = None) -> None:
        self.dtype = dtype
        self.path = path
        self._samples: list[Tensor] = []
        self._shapes: list[torch.Size] = []
        self._offsets: list[int] = []
        self._next: BinaryIO | None = None
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)

    def __len__(self) -> int:
        return len(self._shapes)

    @property
    def nbytes(self) -> int:
        """Size of all samples in bytes."""
        return sum(shape.numel() for shape in self._shapes) * self.dtype.itemsize

    def append(self, value: Tensor) -> None:
        """Add a copy of `value` as the next sample."""
        value = value.detach().to("cpu", self.dtype, copy=True).contiguous()
        self._shapes.append(value.shape)
        if self.path is None:
            self._samples.append(value)
        else:
            with self.path.open("ab") as file:
                _bytes_of(value).tofile(file)

    def seal(self) -> None:
        """End appending."""
        sizes = [shape.numel() * self.dtype.itemsize for shape in self._shapes]
        self._offsets = list(accumulate(sizes, initial=0))[:-1]
        if self.path is not None:
            self._samples = self._mapped(self.path)

    def read(self, index: int) -> Tensor:
        """Return a view of sample `index`."""
        return self._samples[index]

    def gather(self, indices: Sequence[int], out: Tensor | None = None) -> Tensor:
        """Return the samples `indices`, of equal shape but for the batch, concatenated along the batch.

        Written to `out` where it is given, which must have their shape and dtype.
        """
        return torch.cat([self._samples[index] for index in indices], out=out)

    def shape_of(self, indices: Sequence[int]) -> torch.Size:
        """Return the shape of the samples `indices` together."""
        shapes = [self._shapes[index] for index in indices]
        return torch.Size((sum(shape[0] for shape in shapes), *shapes[0][1:]))

    def write(self, index: int, value: Tensor) -> None:
        """Overwrite sample `index`; inside `rewritten`, in the new file."""
        if self._next is None:
            self._samples[index].copy_(value)
        else:
            self._next.seek(self._offsets[index])
            self._next.write(_bytes_of(value.detach().to("cpu", self.dtype)))

    @contextmanager
    def rewritten(self, path: Path | None) -> Iterator[None]:
        """Let `write` fill a new file, each sample once, and go on from that; meanwhile the present file is read.

        A stream in RAM is overwritten where it is; its path is None.
        """
        if path is None or self.path is None:
            yield
            return
        try:
            with path.open("wb") as self._next:
                yield
        finally:
            self._next = None
        self._samples, self.path = self._mapped(path), path

    def save(self, path: Path) -> None:
        """Write all samples to `path` atomically. Where they are in that file already, only wait for the disk."""
        if path == self.path:
            fsync(path)
            fsync(path.parent)
            return
        with atomic_path(path) as temporary, temporary.open("wb") as file:
            for sample in self._samples:
                _bytes_of(sample).tofile(file)

    def restore(self, path: Path) -> None:
        """Take up the samples that `save` wrote to `path`.

        A stream in RAM reads them. One on disk goes on from that file, and removes the one it had.

        Raises:
            CheckpointError: the file is missing or has another size.
        """
        given = path.stat().st_size if path.is_file() else 0
        if given != self.nbytes:
            raise CheckpointError(
                where=str(path),
                given=f"{given} bytes",
                allowed=f"{self.nbytes} bytes, the activations of the last finished block",
                do="the run folder was altered: start again with --overwrite",
            )
        if self.path is None:
            with path.open("rb") as file:
                for sample in self._samples:
                    file.readinto(_bytes_of(sample))
        elif path != self.path:
            self.path.unlink()
            self._samples, self.path = self._mapped(path), path

    def _mapped(self, path: Path) -> list[Tensor]:
        numbers = self.nbytes // self.dtype.itemsize
        buffer = torch.from_file(str(path), shared=True, size=numbers, dtype=self.dtype)
        parts = buffer.split([shape.numel() for shape in self._shapes])
        return [part.view(shape) for part, shape in zip(parts, self._shapes, strict=True)]


def stream_path(folder: Path, name: str, passed: int) -> Path:
    """Return the file of a stream behind the first `passed` blocks."""
    return folder / f"{name}-{passed:05d}.bin"


def _bytes_of(value: Tensor) -> Any:
    return value.contiguous().view(-1).view(torch.uint8).numpy()
