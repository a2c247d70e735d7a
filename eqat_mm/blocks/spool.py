"""Activation streams: one tensor per sample, in RAM or in a memory-mapped file.

Samples may differ in length. On disk a stream is a plain file of numbers, whose shapes are known from the samples.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eqat_mm.errors import CheckpointError, ResourceError
from eqat_mm.runtime.files import atomic_path


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
        value = value.detach().to("cpu", self.dtype, copy=True)
        self._shapes.append(value.shape)
        if self.path is None:
            self._samples.append(value)
        else:
            with self.path.open("ab") as file:
                _bytes_of(value).tofile(file)

    def seal(self) -> None:
        """End appending."""
        if self.path is not None:
            numbers = sum(shape.numel() for shape in self._shapes)
            buffer = torch.from_file(str(self.path), shared=True, size=numbers, dtype=self.dtype)
            self._samples = _split(buffer, self._shapes)

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
        """Overwrite sample `index`."""
        self._samples[index].copy_(value)

    def save(self, path: Path) -> None:
        """Write all samples to `path` atomically."""
        with atomic_path(path) as temporary, temporary.open("wb") as file:
            for sample in self._samples:
                _bytes_of(sample).tofile(file)

    def restore(self, path: Path) -> None:
        """Overwrite all samples from a file that `save` wrote.

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
        saved = torch.from_file(str(path), shared=False, size=self.nbytes // self.dtype.itemsize, dtype=self.dtype)
        for sample, value in zip(self._samples, _split(saved, self._shapes), strict=True):
            sample.copy_(value)


def require_disk(folder: Path, needed: int, what: str) -> None:
    """Check that the file system of `folder` has `needed` free bytes.

    Raises:
        ResourceError: it has not.
    """
    existing = next(parent for parent in (folder, *folder.resolve().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise ResourceError(
            where=f"{folder} ({what})",
            given=f"{free / 2**30:.2f} GiB free",
            allowed=f"at least {needed / 2**30:.2f} GiB",
            do="free disk space, choose another --output, or use fewer or shorter calibration samples",
        )


def _bytes_of(value: Tensor) -> Any:
    return value.contiguous().view(-1).view(torch.uint8).numpy()


def _split(buffer: Tensor, shapes: Sequence[torch.Size]) -> list[Tensor]:
    parts = buffer.split([shape.numel() for shape in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
