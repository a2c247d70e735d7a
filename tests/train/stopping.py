"""Stopping a training run at a chosen step."""

from __future__ import annotations

from typing import Any

import pytest

from eqat_mm.train.end_to_end import EndToEndTrainer


def stop_at_step(monkeypatch: pytest.MonkeyPatch, step: int, signal: type[BaseException]) -> list[int]:
    """Raise `signal` once in training, at loss number `step`; return the numbers asked for, as they grow."""
    asked: list[int] = []
    compute_loss = EndToEndTrainer.compute_loss

    def counting(self: EndToEndTrainer, *args: Any, **kwargs: Any) -> Any:
        asked.append(len(asked) + 1)
        if asked[-1] == step:
            raise signal
        return compute_loss(self, *args, **kwargs)

    monkeypatch.setattr(EndToEndTrainer, "compute_loss", counting)
    return asked
