"""The baseline beside E2E-QP: low-rank adapters on the frozen packed model (QLoRA), through `peft`.

It is trained by E2E-QP's trainer on the same samples. What it cannot do is what E2E-QP is for: the adapters do not fit
on the grid, so they stay a second, full-precision path of the model.
"""

from __future__ import annotations

from dataclasses import dataclass

from eqat_mm.runtime.settings import Count, Positive, Settings


@dataclass(frozen=True)
class LoRA(Settings, option="lora"):
    """Adapters on every packed linear. The defaults are QLoRA's for 7B and 13B parameters, without its dropout.

    Attributes:
        rank: of the adapters.
        alpha: what they add is scaled by alpha / rank.
        learning_rate: peak learning rate of the adapters.
    """

    rank: Count = 64
    alpha: Count = 16
    learning_rate: Positive = 2e-4
