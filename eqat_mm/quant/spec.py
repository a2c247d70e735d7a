"""What "w2g64" means, as one value that travels with the weights."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch

from eqat_mm.errors import CheckpointError, ConfigError
from eqat_mm.runtime.files import read_json_object
from eqat_mm.runtime.settings import Filled, OneOf, Settings, require

BITS = (2, 3, 4, 8)
GROUP_SIZES = (32, 64, 128, 256, -1)

WeightBits = Annotated[int, OneOf(BITS)]
GroupSize = Annotated[int, OneOf(GROUP_SIZES)]
Table = Annotated[dict[str, WeightBits], Filled()]
"""Bits of every quantized linear, by its path from the list of blocks on: `layers.0.mlp.up_proj`."""


@dataclass(frozen=True)
class QuantSpec(Settings, option="quant"):
    """Uniform group-wise weight quantization (EfficientQAT, eqs. 1 and 2).

    Attributes:
        bits: width N of a weight code: 2, 3, 4 or 8.
        group_size: consecutive input channels that share one step size and zero point: 32, 64, 128, 256,
            or -1 for one group per output row.
        symmetric: the zero point is fixed to 2^(N-1), neither trained nor stored; the step size may be negative.
        scale_dtype: 16-bit float in which step sizes are stored.
        allocation: file of `eqat allocate` that gives each linear bits of its own, or the table in it; `bits` then only
            chooses the recipe.
    """

    bits: WeightBits = 2
    group_size: GroupSize = 64
    symmetric: bool = False
    scale_dtype: Literal["bfloat16", "float16"] = "bfloat16"
    allocation: Path | Table | None = None

    def resolved(self) -> QuantSpec:
        """Return the spec with the table of its allocation, where it is a file; `bits` are the fewest in it.

        Raises:
            ConfigError: no such file, or no allocation in it.
        """
        if self.allocation is None:
            return self
        table = _read(self.allocation) if isinstance(self.allocation, Path) else self.allocation
        return replace(self, bits=min(table.values()), allocation=table)

    @property
    def table(self) -> Table:
        """Bits of linears that have bits of their own; empty where all have the same."""
        assert not isinstance(self.allocation, Path), "an allocation is resolved before it is used"
        return self.allocation or {}

    def of(self, linear: str) -> QuantSpec:
        """Return the spec of one linear, by its path in the model or its name in files.

        Raises:
            CheckpointError: the allocation, that of a checkpoint, has no such linear.
        """
        if self.allocation is None:
            return self
        table, end = self.table, linear
        while end and end not in table:
            end = end.partition(".")[2]
        if not end:
            allowed = "bits for each quantized linear, where they differ"
            raise CheckpointError(linear, "no bits for it", allowed, "copy or make the checkpoint again")
        return replace(self, bits=table[end], allocation=None)

    @property
    def top(self) -> int:
        """Largest code, 2^N - 1."""
        return (1 << self.bits) - 1

    @property
    def middle(self) -> int:
        """Zero point of the symmetric grid, 2^(N-1)."""
        return 1 << (self.bits - 1)

    @property
    def storage_dtype(self) -> torch.dtype:
        """Torch dtype of stored step sizes."""
        return torch.bfloat16 if self.scale_dtype == "bfloat16" else torch.float16

    @property
    def name(self) -> str:
        """Short name, `w2g64`, `w2g64sym`, or `w2to4g64` where linears differ."""
        group = "row" if self.group_size == -1 else str(self.group_size)
        return f"w{self.widths.replace(' ', '')}g{group}{'sym' if self.symmetric else ''}"

    @property
    def widths(self) -> str:
        """Bits in words: `2`, or `2 to 4` where linears differ."""
        most = max([self.bits, *self.table.values()])
        return f"{self.bits}" if most == self.bits else f"{self.bits} to {most}"

    def group_of(self, in_features: int, layer: str) -> int:
        """Return the group size for a layer with `in_features` inputs.

        Raises:
            ConfigError: the group size does not divide `in_features`; names `layer` and what would.
        """
        if self.group_size == -1:
            return in_features
        if in_features % self.group_size:
            fitting = [size for size in GROUP_SIZES if size > 0 and in_features % size == 0]
            raise ConfigError(
                where=f"quant.group_size, at {layer}",
                given=f"{self.group_size}, which does not divide in_features={in_features}",
                allowed=", ".join(map(str, [*fitting, -1])) + " for this layer",
                do="choose one of these with --quant.group_size, in LLM-QAT --group_size",
            )
        return self.group_size

    def bits_per_weight(self, in_features: int) -> float:
        """Stored bits per weight with step sizes and zero points, N + (N + 16) / g (N + 16 / g if symmetric)."""
        group = in_features if self.group_size == -1 else self.group_size
        return self.bits + (16 + (0 if self.symmetric else self.bits)) / group

    def as_dict(self) -> dict[str, Any]:
        """Fields, JSON-ready where the allocation is resolved."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def _read(path: Path) -> Table:
    """Return the table of an allocation file.

    Raises:
        ConfigError: it holds none.
    """
    try:
        table: Any = read_json_object(path).get("bits")
    except CheckpointError as error:
        allowed, do = "a file that `eqat allocate` writes", "make it: eqat allocate --model MODEL --average_bits 2.5"
        raise ConfigError(f"--quant.allocation {path}", error.given, allowed, do) from error
    require(Table, table, f"--quant.allocation {path}: bits")
    found: Table = table
    return found
