"""The samples that a run began with, by what they say: so that it goes on as it began where the source has changed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

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
            save_file(columns, temporary)

    @classmethod
    def open(cls, folder: Path) -> Kept | None:
        """Return those of a run folder; None where it has none."""
        try:
            return cls(**load_file(folder / SAMPLES))
        except (OSError, SafetensorError, TypeError):
            return None

    def found_in(self, others: Kept, places: NDArray[Any]) -> NDArray[Any]:
        """Return where each of these is among others, whose places are given: int64 [samples], -1 for nowhere."""
        order = np.argsort(others.contents, kind="stable")
        at = np.searchsorted(others.contents, self.contents, sorter=order)
        first = order[np.minimum(at, len(order) - 1)]
        same = (others.contents[first] == self.contents) & (others.text_only[first] == self.text_only)
        return np.where(same, places[first], -1)
