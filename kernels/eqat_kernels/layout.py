"""Shape of a packed weight matrix."""

from __future__ import annotations

from dataclasses import dataclass, field

BITS = (2, 3, 4, 8)
"""Widths of a code, the N of the formulas."""


@dataclass(frozen=True)
class PackedLayout:
    """Shape of one packed weight matrix W[O, I].

    Attributes:
        bits: N, width of a code.
        group_size: input channels that share a step size; it divides `in_features`.
        out_features: O.
        in_features: I.
        groups: G, groups per output row.
        words_shape: shape of the packed codes, [O, ceil(I*N/32)].
        zeros_shape: shape of the packed zero points, [ceil(O*N/32), G].
        numbers: the first four, for an op of torch, whose arguments are numbers and tensors.
    """

    bits: int
    group_size: int
    out_features: int
    in_features: int
    groups: int = field(init=False, repr=False, compare=False)  # from here on computed once: every call checks them
    words_shape: tuple[int, int] = field(init=False, repr=False, compare=False)
    zeros_shape: tuple[int, int] = field(init=False, repr=False, compare=False)
    numbers: tuple[int, int, int, int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Check the numbers, and compute the rest.

        Raises:
            ValueError: a width that is not packed, a size below 1, or a group size that does not divide I.
        """
        if self.bits not in BITS or min(self.group_size, self.out_features, self.in_features) < 1:
            raise ValueError(f"no layout of a packed weight: {self}")
        if self.in_features % self.group_size:
            raise ValueError(f"groups of {self.group_size} do not divide rows of {self.in_features} weights")
        groups = self.in_features // self.group_size
        computed = {
            "groups": groups,
            "words_shape": (self.out_features, words_for(self.in_features, self.bits)),
            "zeros_shape": (words_for(self.out_features, self.bits), groups),
            "numbers": (self.bits, self.group_size, self.out_features, self.in_features),
        }
        for name, value in computed.items():
            object.__setattr__(self, name, value)


def words_for(codes: int, bits: int) -> int:
    """Return how many 32-bit words a row of `codes` codes takes."""
    return -(-codes * bits // 32)


def columns_of_tile(layout: PackedLayout, most: int) -> int:
    """Return the largest of 32, 64, 128, .. up to `most` that divides the group size: a tile's columns share one group.

    With one group per row every width will do. Thirty-two codes fill whole words at every bit width, so tiles begin
    at words.
    """
    columns = 32
    while columns < most and (layout.groups == 1 or layout.group_size % (2 * columns) == 0):
        columns *= 2
    return columns
