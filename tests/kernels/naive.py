"""The specification spelled out one bit and one element at a time, to compare the kernels with.

Shape letters: O output rows, I inputs, G groups, g group size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from eqat_kernels import PackedLayout, pack


def random_codes(*shape: int, bits: int) -> Tensor:
    """Draw codes uniformly from [0, 2^N), uint8."""
    return torch.randint(0, 1 << bits, shape, dtype=torch.uint8)


def pack_bits(codes: list[int], bits: int) -> list[int]:
    """Write the codes into one long bit string, lowest bit first, and cut it into signed 32-bit words."""
    stream = [(code >> bit) & 1 for code in codes for bit in range(bits)]
    stream += [0] * (-len(stream) % 32)
    words = [
        sum(bit << place for place, bit in enumerate(stream[start : start + 32])) for start in range(0, len(stream), 32)
    ]
    return [word - (1 << 32) if word >= 1 << 31 else word for word in words]


def per_weight(grid_OG: Tensor, in_features: int) -> Tensor:
    """Repeat a value per group for every weight of the group, [O, G] -> [O, I]."""
    return grid_OG.repeat_interleave(in_features // grid_OG.shape[1], dim=1)


def per_group(summand_OI: Tensor, groups: int) -> Tensor:
    """Sum over the weights of each group, [O, I] -> [O, G]."""
    rows, columns = summand_OI.shape
    return summand_OI.reshape(rows, groups, columns // groups).sum(-1)


@dataclass(frozen=True)
class FakeQuantResult:
    """What one element of W gives: W_hat, its three derivatives, and where it lies."""

    value: float
    by_weight: float
    by_scale: float
    by_zero: float
    inside: bool


def fake_quantize_element(w: float, s: float, z: float, bits: int) -> FakeQuantResult:
    """Apply eqs. 1 and 2 and the table of straight-through derivatives; Python's round is half-to-even."""
    top, zr, u = (1 << bits) - 1, round(z), w / s
    code = round(u) + zr
    if code < 0:
        return FakeQuantResult((0 - zr) * s, 0.0, -zr, -s, inside=False)
    if code > top:
        return FakeQuantResult((top - zr) * s, 0.0, top - zr, -s, inside=False)
    return FakeQuantResult((code - zr) * s, 1.0, round(u) - u, 0.0, inside=True)


def fake_quantize_elements(w_OI: Tensor, s_OG: Tensor, z_OG: Tensor, bits: int) -> dict[str, Tensor]:
    """Run `fake_quantize_element` over a matrix; every field as float64 [O, I]."""
    s_OI, z_OI = per_weight(s_OG, w_OI.shape[1]), per_weight(z_OG, w_OI.shape[1])
    triples = zip(w_OI.flatten().tolist(), s_OI.flatten().tolist(), z_OI.flatten().tolist(), strict=True)
    results = [fake_quantize_element(w, s, z, bits) for w, s, z in triples]
    return {
        name: torch.tensor([getattr(result, name) for result in results], dtype=torch.float64).view_as(w_OI)
        for name in ("value", "by_weight", "by_scale", "by_zero", "inside")
    }


@dataclass
class PackedWeight:
    """A random packed weight together with what it was packed from."""

    layout: PackedLayout
    codes_OI: Tensor
    zero_OG: Tensor
    scale: Tensor
    words: Tensor
    zero_words: Tensor | None

    def dense(self) -> Tensor:
        """W_hat = (W_int - z) * s in float64, with the gradient of `scale` attached."""
        columns = self.layout.in_features
        centred_OI = self.codes_OI.double() - per_weight(self.zero_OG.double(), columns)
        return centred_OI * per_weight(self.scale.double(), columns)


def random_packed_weight(
    bits: int, out_features: int, groups: int, group_size: int, *, symmetric: bool = False
) -> PackedWeight:
    """Draw codes, zero points and step sizes; symmetric ones have step sizes of both signs."""
    layout = PackedLayout(bits, group_size, out_features, groups * group_size)
    codes_OI = random_codes(out_features, layout.in_features, bits=bits)
    scale = torch.rand(out_features, groups) + 0.5
    if symmetric:
        scale *= torch.randn(out_features, groups).sign()
        zero_OG = torch.full((out_features, groups), 1 << (bits - 1), dtype=torch.uint8)
        return PackedWeight(layout, codes_OI, zero_OG, scale, pack(codes_OI, bits), None)
    zero_OG = random_codes(out_features, groups, bits=bits)
    zero_words = pack(zero_OG.T.contiguous(), bits).T.contiguous()
    return PackedWeight(layout, codes_OI, zero_OG, scale, pack(codes_OI, bits), zero_words)
