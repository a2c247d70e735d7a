"""The samples that a run began with, by what they say: so that it goes on as it began where the source has changed."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from eqat_mm.errors import CheckpointError
from eqat_mm.runtime.files import atomic_path

SAMPLES = "samples.safetensors"
"""Name of the file in a run folder."""


@dataclass(frozen=True)
class Kept:
    """Samples of a run, in the order in which it counts them.

    Attributes:
        contents: hash of what each says, int64 [samples].
        lengths: tokens, int32 [samples].
        text_only: whether each has no image, bool [samples].
    """

    contents: NDArray[Any]
    lengths: NDArray[Any]
    text_only: NDArray[Any]

    def save(self, folder: Path) -> None:
        """Write them into a run folder."""
        columns = {name: np.ascontiguousarray(value) for name, value in vars(self).items()}
        with atomic_path(folder / SAMPLES) as temporary:
            save_file(columns, temporary, metadata={"digest": _digest(columns)})

    @classmethod
    def open(cls, folder: Path) -> Kept | None:
        """Return those of a run folder; None where it has none.

        Raises:
            CheckpointError: the file is damaged.
        """
        path = folder / SAMPLES
        if not path.is_file():
            return None
        try:
            with safe_open(path, framework="numpy") as file:
                columns = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
                whole = (file.metadata() or {}).get("digest") == _digest(columns)
        except (OSError, SafetensorError) as error:
            raise _damaged(path, str(error)) from error
        if not whole:
            raise _damaged(path, "other samples than the run wrote")
        return cls(**columns)

    def found_in(self, others: Kept, places: NDArray[Any]) -> NDArray[Any]:
        """Return where each of these is among others, whose places are given: int64 [samples], -1 for nowhere."""
        order = np.argsort(others.contents, kind="stable")
        at = np.searchsorted(others.contents, self.contents, sorter=order)
        first = order[np.minimum(at, len(order) - 1)]
        same = (others.contents[first] == self.contents) & (others.text_only[first] == self.text_only)
        return np.where(same, places[first], -1)


def _digest(columns: Mapping[str, NDArray[Any]]) -> str:
    content = b"".join(name.encode() + columns[name].tobytes() for name in sorted(columns))
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def _damaged(path: Path, found: str) -> CheckpointError:
    return CheckpointError(
        where=str(path),
        given=found,
        allowed="the samples that the run began with, as it wrote them",
        do="remove this file: the same command then takes its samples from the source, which must not have changed",
    )
