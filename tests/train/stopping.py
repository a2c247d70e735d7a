"""Training runs that stop at a chosen step, and go on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel

from eqat_mm.train.end_to_end import EndToEndTrainer
from tests.train.problems import same


class Stopped(BaseException):
    """Stands in for a power cut."""


def stop_at_step(monkeypatch: pytest.MonkeyPatch, step: int) -> list[int]:
    """Stop once in training, at loss number `step`; return the numbers asked for, as they grow."""
    asked: list[int] = []
    compute_loss = EndToEndTrainer.compute_loss

    def counting(self: EndToEndTrainer, *args: Any, **kwargs: Any) -> Any:
        asked.append(len(asked) + 1)
        if asked[-1] == step:
            raise Stopped
        return compute_loss(self, *args, **kwargs)

    monkeypatch.setattr(EndToEndTrainer, "compute_loss", counting)
    return asked


def assert_a_stopped_run_is_continued(
    monkeypatch: pytest.MonkeyPatch,
    folder: Path,
    make: Callable[[], PreTrainedModel],
    train: Callable[[PreTrainedModel, Path], list[float]],
) -> None:
    """A run stopped in its fourth step gives the model and the losses of an undisturbed one.

    Args:
        monkeypatch: stops it.
        folder: for the runs.
        make: returns a model to train, always the same.
        train: six steps, saved every second, in a folder; returns their losses.
    """
    undisturbed, continued = make(), make()
    curve = train(undisturbed, folder / "undisturbed")
    steps = stop_at_step(monkeypatch, 4)
    with pytest.raises(Stopped):
        train(make(), folder / "stopped")
    assert train(continued, folder / "stopped") == curve
    assert len(steps) == 4 + 4  # two of the first three steps were saved
    assert same(continued, undisturbed)
