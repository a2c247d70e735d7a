"""Sizes of the tiles of the packed linear kernels: few, each with its reason.

None has been timed on a device yet; `benchmarks/time_kernels.py --tune` does that. They follow from the instructions of
the hardware and from registers and spills as compiled (`python -m eqat_kernels.aot`).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from functools import cache

import torch

from eqat_kernels.layout import PackedLayout, columns_of_tile


@dataclass(frozen=True)
class Tile:
    """One choice for a kernel.

    Attributes:
        M: tokens.
        N: outputs.
        K: inputs; at most one group, see `columns_of_tile`.
        num_warps: warps of a program.
        num_stages: tiles that are loaded ahead.
    """

    M: int
    N: int
    K: int
    num_warps: int
    num_stages: int

    def arguments(self) -> dict[str, int]:
        """Keyword arguments of a launch."""
        return asdict(self)


DECODE_ROWS = 16
"""Rows up to which a batch is a decode step: the smallest M of a tensor-core instruction."""

DECODE = Tile(M=16, N=64, K=128, num_warps=4, num_stages=4)
"""Limited by the bytes of the words: narrow in M, deep in K, many loads in flight."""

FEW = Tile(M=64, N=64, K=64, num_warps=4, num_stages=3)
"""17 to 64 rows: no rows wasted on padding, and twice the programs of MANY."""

MANY = Tile(M=128, N=128, K=32, num_warps=8, num_stages=4)
"""Limited by the products: every unpacked weight is used for 128 tokens, 64 sums a thread. K = 64 spills at 3 bits."""

INPUT_GRADIENT = Tile(M=128, N=64, K=128, num_warps=8, num_stages=3)
"""MANY with the walk along O."""

SCALE_GRADIENT = Tile(M=64, N=128, K=128, num_warps=8, num_stages=3)
"""A weight gradient of 128 x 128 in registers, 64 sums a thread, while 64 tokens at a time pass."""

FLOAT32 = Tile(M=32, N=32, K=32, num_warps=4, num_stages=2)
"""float32 without tensor cores holds its operands in registers; a small tile keeps them from spilling."""

DECODE_FLOAT32 = Tile(M=16, N=16, K=32, num_warps=4, num_stages=2)
"""The same for few rows; N = 32 spills at 8 bits."""


def forward_tile(tokens: int, layout: PackedLayout, dtype: torch.dtype) -> Tile:
    """Return the tile of the forward."""
    if tokens <= DECODE_ROWS:
        return _fit(DECODE_FLOAT32 if dtype is torch.float32 else DECODE, layout)
    if dtype is torch.float32:
        return _fit(FLOAT32, layout)
    return _fit(FEW if tokens <= FEW.M else MANY, layout)


def input_gradient_tile(layout: PackedLayout, dtype: torch.dtype) -> Tile:
    """Return the tile of dx."""
    return _fit(FLOAT32 if dtype is torch.float32 else INPUT_GRADIENT, layout)


def scale_gradient_tile(layout: PackedLayout, dtype: torch.dtype) -> Tile:
    """Return the tile of ds."""
    return _fit(FLOAT32 if dtype is torch.float32 else SCALE_GRADIENT, layout)


def splits(tokens: int, layout: PackedLayout, tile: Tile, device: torch.device) -> tuple[int, int]:
    """Return over how many programs the walk of the forward along I is split, and how many tiles each walks.

    A decode step of a 4096 x 4096 layer has 64 programs, fewer than a GPU has processors. It is split until there
    are two programs for each of them, so that one loads while the other multiplies, but not below two tiles each.
    """
    walk = -(-layout.in_features // tile.K)
    if tokens > DECODE_ROWS:
        return 1, walk
    programs = -(-layout.out_features // tile.N)
    shares = max(1, min(2 * _processors(device) // programs, walk // 2))
    steps = -(-walk // shares)
    return -(-walk // steps), steps


@cache
def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 8  # interpreted: enough that splitting is tested
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _fit(tile: Tile, layout: PackedLayout) -> Tile:
    return replace(tile, K=columns_of_tile(layout, tile.K))
