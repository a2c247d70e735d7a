"""What a folder holds of a quantized linear, unpacked by numpy (O outputs, I inputs, G groups, N bits)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from eqat_mm.verify.slabs import Array, Slab

_ROWS = 256
"""Unpacked at once: a bit takes a byte meanwhile."""


@dataclass(frozen=True)
class Held:
    """The weight of one linear, (q - z) s.

    Attributes:
        codes: q, uint8 [O, I].
        scale: s, float32 [O, G].
        zeros: z, uint8 [O, G].
    """

    codes: NDArray[np.uint8]
    scale: NDArray[np.float32]
    zeros: NDArray[np.uint8]

    def weight(self) -> NDArray[np.float32]:
        """Return it, float32 [O, I]."""
        rows, groups = self.scale.shape
        steps = self.codes.reshape(rows, groups, -1).astype(np.float32) - self.zeros[..., None].astype(np.float32)
        dense: NDArray[np.float32] = (steps * self.scale[..., None]).reshape(rows, -1)
        return dense


def unpacked(words: Array, bits: int, count: int) -> NDArray[np.uint8]:
    """Return the first `count` codes of N bits of each row, uint8 [rows, count].

    A row is one stream of bits, little end first: code i has the bits i N to (i + 1) N - 1.

    Args:
        words: whole numbers of any size, [rows, words].
        bits: N.
        count: codes in a row.
    """
    stream = np.ascontiguousarray(words).view(np.uint8).reshape(len(words), -1)
    codes = np.empty((len(words), count), np.uint8)
    values = (1 << np.arange(bits)).astype(np.uint8)
    for first in range(0, len(words), _ROWS):
        single = np.unpackbits(stream[first : first + _ROWS], axis=1, count=count * bits, bitorder="little")
        codes[first : first + _ROWS] = single.reshape(-1, count, bits) @ values
    return codes


def held_in(slabs: Mapping[str, Slab], linear: str, bits: int) -> Held:
    """Return what a packed checkpoint holds of a linear.

    Args:
        slabs: of the checkpoint, by name.
        linear: name of it in the same words.
        bits: N.
    """
    scale = slabs[f"{linear}.weight_scale"].numbers()
    rows, groups = scale.shape
    if f"{linear}.weight_packed" in slabs:
        _, columns = (int(size) for size in slabs[f"{linear}.weight_shape"].stored())
        codes = unpacked(slabs[f"{linear}.weight_packed"].stored(), bits, columns)
    else:  # whole bytes, signed
        codes = (slabs[f"{linear}.weight"].stored().astype(np.int16) + (1 << bits - 1)).astype(np.uint8)
    zeros = np.full((rows, groups), 1 << bits - 1, np.uint8)
    if f"{linear}.weight_zero_point" in slabs:
        zeros = unpacked(slabs[f"{linear}.weight_zero_point"].stored().T, bits, rows).T
    return Held(codes, scale, zeros)
