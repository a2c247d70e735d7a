"""What "4-8-4" means: bits of weights, activations and KV cache, as LLM-QAT writes them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from eqat_mm.errors import ConfigError
from eqat_mm.quant.spec import WeightBits
from eqat_mm.runtime.settings import OneOf, Settings

UNQUANTIZED = 16
"""Stands for activations or a KV cache that stay in floating point."""


@dataclass(frozen=True)
class BitWidths(Settings):
    """A setting W-A-KV (LLM-QAT, arXiv 2305.17888).

    Attributes:
        weights: of the linears in the decoder blocks: 2, 3, 4 or 8.
        activations: of the inputs of these linears: 4, 6, 8, or 16 for floating point.
        kv_cache: of keys and values: 4, 8, or 16 for floating point.
    """

    option: ClassVar[str] = "bits, "
    weights: WeightBits
    activations: Annotated[int, OneOf((4, 6, 8, UNQUANTIZED))] = UNQUANTIZED
    kv_cache: Annotated[int, OneOf((4, 8, UNQUANTIZED))] = UNQUANTIZED

    @classmethod
    def parse(cls, text: str) -> BitWidths:
        """Return the widths that `text` names, for example `4-8-4`.

        Raises:
            ConfigError: not three numbers with hyphens between them, or a width that is not allowed.
        """
        parts = text.split("-")
        if len(parts) != 3 or not all(part.isdecimal() and len(part) < 3 for part in parts):
            raise ConfigError(
                where="--bits",
                given=repr(text),
                allowed="three bit widths: weights-activations-cache",
                do="write for example 4-8-4, or 4-8-16 to leave the cache as it is",
            )
        return cls(*map(int, parts))

    @property
    def name(self) -> str:
        """Short name, `4-8-4`."""
        return f"{self.weights}-{self.activations}-{self.kv_cache}"

    @property
    def dynamic(self) -> tuple[int, int]:
        """Widths of what has no step sizes on disk: activations and KV cache."""
        return self.activations, self.kv_cache
