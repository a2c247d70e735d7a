"""The baseline beside E2E-QP: low-rank adapters on the frozen packed model (QLoRA), through `peft`.

It is trained by E2E-QP's trainer on the same samples. What it cannot do is what E2E-QP is for: the adapters do not fit
on the grid, so they stay a second, full-precision path of the model.
"""

from __future__ import annotations

from dataclasses import dataclass

from eqat_mm.errors import ConfigError


@dataclass(frozen=True)
class LoRA:
    """Adapters on every packed linear. The defaults are QLoRA's for 7B and 13B parameters, without its dropout.

    Attributes:
        rank: of the adapters.
        alpha: what they add is scaled by alpha / rank.
        learning_rate: peak, of the adapters.

    Raises:
        ConfigError: a value outside its range.
    """

    rank: int = 64
    alpha: int = 16
    learning_rate: float = 2e-4

    def __post_init__(self) -> None:
        """Check every value."""
        for name in ("rank", "alpha", "learning_rate"):
            value = getattr(self, name)
            if not value > 0:
                raise ConfigError(f"--lora.{name}", str(value), "a number above 0", f"raise lora.{name}")
