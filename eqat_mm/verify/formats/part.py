"""What a reader of an exported format gives: one tensor after the other, by its name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eqat_mm.verify.slabs import Array

READERS = {
    "gguf": "eqat_mm.verify.formats.gguf:parts",
    "mlx": "eqat_mm.verify.formats.mlx:parts",
    "gptq": "eqat_mm.verify.formats.gptq:parts",
    "onnx": "eqat_mm.verify.formats.onnx:parts",
}
"""Format -> `module:function` from the exported folder to its parts."""


@dataclass(frozen=True)
class Part:
    """One tensor as the engine computes with it.

    Attributes:
        name: in the files of the checkpoint, or in the model.
        values: float32, in the shape it has in the checkpoint.
        slack: how far each value may be from the checkpoint's, where the format rounds what is not quantized.
    """

    name: str
    values: NDArray[np.float32]
    slack: Array | float = 0.0


def reader_of(form: str) -> Callable[[Path], Iterator[Part]]:
    """Return the reader of a format in `READERS`."""
    home, _, function = READERS[form].partition(":")
    found: Any = getattr(import_module(home), function)
    reader: Callable[[Path], Iterator[Part]] = found
    return reader


def by_group(values: Array, columns: int) -> NDArray[np.float32]:
    """Return numbers of groups [O, G] for each of so many columns, float32 [O, columns]."""
    wide: NDArray[np.float32] = np.repeat(values.astype(np.float32), columns // values.shape[1], 1)
    return wide
