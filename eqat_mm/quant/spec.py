"""What "w2g64" means, as one value that travels with the weights."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

import torch

from eqat_mm.errors import ConfigError
from eqat_mm.runtime.settings import OneOf, Settings

BITS = (2, 3, 4, 8)
GROUP_SIZES = (32, 64, 128, 256, -1)

WeightBits = Annotated[int, OneOf(BITS)]
GroupSize = Annotated[int, OneOf(GROUP_SIZES)]


@dataclass(frozen=True)
class QuantSpec(Settings, option="quant"):
    """Uniform group-wise weight quantization (EfficientQAT, eqs. 1 and 2).

    Attributes:
        bits: width N of a weight code: 2, 3, 4 or 8.
        group_size: consecutive input channels that share one step size and zero point: 32, 64, 128, 256,
            or -1 for one group per output row.
        symmetric: the zero point is fixed to 2^(N-1), neither trained nor stored; the step size may be negative.
        scale_dtype: 16-bit float in which step sizes are stored.
    """

    bits: WeightBits = 2
    group_size: GroupSize = 64
    symmetric: bool = False
    scale_dtype: Literal["bfloat16", "float16"] = "bfloat16"

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
        """Short name, `w2g64` or `w2g64sym`."""
        group = "row" if self.group_size == -1 else str(self.group_size)
        return f"w{self.bits}g{group}{'sym' if self.symmetric else ''}"

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
        """JSON-ready fields."""
        return asdict(self)
