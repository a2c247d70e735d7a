"""What every stage does with a loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import get_cosine_schedule_with_warmup


class Descent:
    """AdamW along a cosine with a warm-up.

    Args:
        groups: parameter groups, `params` and peak `lr`.
        steps: steps of the whole descent.
        warmup: steps of rising learning rate at its start.
        weight_decay: as in AdamW.
        clip: largest norm of all gradients together.
    """

    def __init__(
        self, *groups: dict[str, Any], steps: int, warmup: int, weight_decay: float = 0.01, clip: float = 1.0
    ) -> None:
        self.parameters = [parameter for group in groups for parameter in group["params"]]
        self.optimizer = torch.optim.AdamW(list(groups), weight_decay=weight_decay)
        self.schedule = get_cosine_schedule_with_warmup(self.optimizer, warmup, steps)
        self.clip = clip

    def step(self, loss: Tensor) -> None:
        """Go one step down."""
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, self.clip)
        self.optimizer.step()
        self.schedule.step()
