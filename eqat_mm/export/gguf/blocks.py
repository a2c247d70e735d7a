"""Codes and step sizes as GGUF's blocks (O rows, I columns, B columns a block, K = I / B blocks a row, N bits).

A block holds a half-precision d, for Q4_1 also m, and B codes c; its values are

    Q2_0, B = 64: (c - 1) d       Q4_0, B = 32: (c - 8) d       Q4_1, B = 32: c d + m       Q8_0, B = 32: c d

Each of them is computed in float32 and equals (q - z) s of the checkpoint where d and m hold their numbers exactly:

    type   grid                        c            d      m
    Q2_0   symmetric, 2 bits           3 - q       -s
    Q4_0   symmetric, up to 4 bits     q - z + 8    s
    Q4_1   asymmetric, up to 4 bits    q            s     -z s
    Q8_0   symmetric, 8 bits           q - 128      s
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from eqat_mm.export.opened import PackedWeight

_HALF_SIZE = 2
_ROWS = 1024
"""Of a dense weight, at once: an embedding is the largest tensor of a model."""


@dataclass(frozen=True)
class BlockType:
    """A type of GGUF's.

    Attributes:
        name: as llama.cpp calls it.
        number: in files.
        columns: of a block, B.
        halves: half-precision numbers in a block.
        code_bits: of a code.
    """

    name: str
    number: int
    columns: int
    halves: int
    code_bits: int

    @property
    def bytes(self) -> int:
        """Of a block."""
        return self.halves * _HALF_SIZE + self.columns * self.code_bits // 8

    def row_bytes(self, columns: int) -> int:
        """Return the bytes of a row of so many columns."""
        return columns // self.columns * self.bytes


Q2_0 = BlockType("Q2_0", 42, 64, 1, 2)
Q4_0 = BlockType("Q4_0", 2, 32, 1, 4)
Q4_1 = BlockType("Q4_1", 3, 32, 2, 4)
Q8_0 = BlockType("Q8_0", 8, 32, 1, 8)


def block_type(weight: PackedWeight) -> BlockType | None:
    """Return the smallest type whose codes and blocks hold those of a weight; None where there is none."""
    spec = weight.spec
    if spec.bits == 8:
        fitting = [Q8_0] if spec.symmetric else []
    else:
        fitting = ([Q2_0] if spec.bits == 2 else []) + [Q4_0] if spec.symmetric else [Q4_1]
    return next((kind for kind in fitting if weight.group_size % kind.columns == 0), None)


def numbers_of(weight: PackedWeight, kind: BlockType) -> tuple[Tensor, Tensor | None]:
    """Return d and m of every group, float32 [O, G], as they should be; m is None where the type has none."""
    scale = weight.scale().to(torch.float32)
    if kind is Q4_1:
        return scale, -scale * weight.zero_points().to(torch.float32)
    return (-scale if kind is Q2_0 else scale), None


def changed(weight: PackedWeight, kind: BlockType) -> Tensor:
    """Return the groups whose d or m half precision does not hold, bool [O, G]."""
    return torch.stack([_half(number) != number for number in numbers_of(weight, kind) if number is not None]).any(0)


def held(weight: PackedWeight, kind: BlockType) -> Tensor:
    """Return the weight as llama.cpp computes it, float32 [O, I]."""
    d, m = (None if number is None else _half(number) for number in numbers_of(weight, kind))
    assert d is not None
    codes = _codes(weight, kind).to(torch.float32).unflatten(1, (d.shape[1], -1))
    offset = torch.tensor(0.0) if m is None else m.unsqueeze(-1)
    weight_OI: Tensor = ((codes - _ZERO[kind]) * d.unsqueeze(-1) + offset).flatten(1)
    return weight_OI


_ZERO = {Q2_0: 1, Q4_0: 8, Q4_1: 0, Q8_0: 128}
"""The code of zero, of types without m; Q8_0 stores its codes less this."""


def packed(weight: PackedWeight, kind: BlockType, order: Tensor | None = None) -> Tensor:
    """Return the blocks of a weight, uint8 [O, bytes of a row].

    Args:
        weight: of a linear.
        kind: that fits it.
        order: row of the weight that each row of the result is, int64 [O]; None for the same order.
    """
    blocks = weight.in_features // kind.columns
    pack: Callable[[Tensor], Tensor] = _PACK[kind]
    halves = [_per_block(number, blocks) for number in numbers_of(weight, kind) if number is not None]
    codes = _codes(weight, kind).unflatten(1, (blocks, kind.columns))
    whole = torch.cat([*halves, pack(codes)], -1).flatten(1)
    return whole if order is None else whole[order]


def q8_0(weight: Tensor) -> Tensor:
    """Return a dense weight in rounded 8-bit blocks, uint8 [O, bytes of a row], from floats [O, I]."""
    return torch.cat([_q8_0(rows) for rows in weight.split(_ROWS)])


def _q8_0(weight: Tensor) -> Tensor:
    blocks = weight.to(torch.float32).unflatten(1, (-1, Q8_0.columns))
    d = blocks.abs().amax(-1, keepdim=True) / 127
    codes = torch.where(d == 0, 0.0, blocks / d).round().to(torch.int8)
    return torch.cat([_bytes(d), codes.view(torch.uint8)], -1).flatten(1)


def _codes(weight: PackedWeight, kind: BlockType) -> Tensor:
    """Return the codes c, uint8 [O, I]; of Q8_0 those of its zero at 128."""
    q = weight.codes()
    if kind is Q2_0:
        return 3 - q
    return q if kind in (Q4_1, Q8_0) else q + (8 - weight.spec.middle)


def _half(number: Tensor) -> Tensor:
    rounded: Tensor = number.to(torch.float16).to(torch.float32)
    return rounded


def _per_block(number: Tensor, blocks: int) -> Tensor:
    """Return a number of every group as bytes of every block, uint8 [O, K, 2]."""
    return _bytes(number.repeat_interleave(blocks // number.shape[1], 1).unsqueeze(-1))


def _bytes(number: Tensor) -> Tensor:
    return number.to(torch.float16).contiguous().view(torch.uint8)


def _quarters(codes: Tensor) -> Tensor:
    """Return four neighbouring codes in a byte, the first lowest, uint8 [O, K, B / 4]."""
    fours = codes.unflatten(-1, (-1, 4))
    joined: Tensor = fours[..., 0] | fours[..., 1] << 2 | fours[..., 2] << 4 | fours[..., 3] << 6
    return joined


def _nibbles(codes: Tensor) -> Tensor:
    """Return the first half of a block in low nibbles and the second in high ones, uint8 [O, K, B / 2]."""
    low, high = codes.chunk(2, -1)
    return low | high << 4


_PACK = {Q2_0: _quarters, Q4_0: _nibbles, Q4_1: _nibbles, Q8_0: lambda codes: codes ^ 128}
