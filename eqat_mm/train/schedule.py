"""Cosine decay with a short linear warm-up, as a factor on every learning rate."""

from __future__ import annotations

import math


def cosine_factor(step: int, total: int, *, warmup: int = 0, floor: float = 0.05) -> float:
    """Return the learning-rate factor of `step` (0-based) out of `total` steps.

    Rises linearly over `warmup` steps, then falls along a half cosine from 1 to `floor`.
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    done = (step - warmup) / max(1, total - warmup)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
