"""Codes, step sizes and zero points of other formats by numpy, written from the definitions of the formats alone."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Grid(NamedTuple):
    """Codes [O, I]; step sizes and zero points of each input, [O, I]."""

    codes: NDArray[np.int64]
    steps: NDArray[np.float64]
    zeros: NDArray[np.float64]


def bits_of(row: NDArray[np.integer], bits: int) -> NDArray[np.int64]:
    """Return the numbers of so many bits in a row of words, lowest bits first, [..., n]."""
    octets = np.ascontiguousarray(row).view(np.uint8)
    stream = np.unpackbits(octets, axis=-1, bitorder="little")
    whole = stream[..., : stream.shape[-1] // bits * bits]
    return whole.reshape(*whole.shape[:-1], -1, bits) @ (1 << np.arange(bits))


def from_mlx(tensors: dict[str, NDArray], bits: int, group: int) -> Grid:
    """`w = scales * q + biases` in groups along a row."""
    codes = bits_of(tensors["weight"], bits)
    steps, offsets = (np.repeat(tensors[name].astype(np.float64), group, 1) for name in ("scales", "biases"))
    return Grid(codes, steps, -offsets / steps)


def from_gptq(tensors: dict[str, NDArray], bits: int) -> Grid:
    """`w = scales[g] * (q - qzeros[g])`, g the group of an input; everything is transposed."""
    groups, steps = tensors["g_idx"], tensors["scales"].astype(np.float64).T
    codes, zeros = bits_of(tensors["qweight"].T, bits), bits_of(tensors["qzeros"], bits).T
    return Grid(codes, steps[:, groups], zeros[:, groups].astype(np.float64))


def from_matmul_nbits(tensors: dict[str, NDArray], bits: int, block: int) -> Grid:
    """`w = scales * (q - qzeros)`, bytes of blocks along a row."""
    codes = bits_of(tensors["qweight"], bits)
    steps = tensors["scales"].astype(np.float64)
    zeros = bits_of(tensors["qzeros"], bits)[:, : steps.shape[1]]
    return Grid(codes, np.repeat(steps, block, 1), np.repeat(zeros.astype(np.float64), block, 1))
