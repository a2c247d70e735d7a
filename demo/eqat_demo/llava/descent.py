"""What every stage does with a loss, and what it keeps, so that a stopped one goes on."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import get_cosine_schedule_with_warmup

from eqat_mm.runtime.files import atomic_path
from eqat_mm.runtime.progress import progress, say
from eqat_mm.runtime.seeding import generator

_SECONDS_BETWEEN_SAVES = 120


class Descent:
    """AdamW along a cosine with a warm-up.

    Args:
        groups: parameter groups, `params` and peak `lr`.
        steps: steps of the descent.
        warmup: steps of rising learning rate at its start.
        weight_decay: as in AdamW.
        clip: largest norm of all gradients together.
        kept: file of what a stopped descent goes on from; None keeps nothing.
    """

    def __init__(
        self,
        *groups: dict[str, Any],
        steps: int,
        warmup: int,
        weight_decay: float = 0.01,
        clip: float = 1.0,
        kept: Path | None = None,
    ) -> None:
        self.parameters = [parameter for group in groups for parameter in group["params"]]
        self.optimizer = torch.optim.AdamW(list(groups), weight_decay=weight_decay)
        self.schedule: Any = get_cosine_schedule_with_warmup(self.optimizer, warmup, steps)
        self.total, self.clip, self.kept = steps, clip, kept

    def steps(self, what: str) -> Iterator[int]:
        """Yield the numbers of the steps that are left, behind a bar; what a caller draws must follow from them."""
        first, saved = self._go_on(what), time.monotonic()
        for step in progress(range(first, self.total), what=what, total=self.total - first, unit="step"):
            yield step
            if self.kept is not None and time.monotonic() - saved > _SECONDS_BETWEEN_SAVES:
                self._keep(self.kept, step + 1)
                saved = time.monotonic()

    def step(self, loss: Tensor) -> None:
        """Go one step down."""
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, self.clip)
        self.optimizer.step()
        self.schedule.step()

    def _keep(self, file: Path, step: int) -> None:
        parameters = [parameter.detach() for parameter in self.parameters]
        state = {"optimizer": self.optimizer.state_dict(), "schedule": self.schedule.state_dict()}
        with atomic_path(file) as temporary:
            torch.save({"step": step, "steps": self.total, "parameters": parameters, **state}, temporary)

    def _go_on(self, what: str) -> int:
        """Return the step to begin with, everything as it was then."""
        if self.kept is None or not self.kept.exists():
            return 0
        state = torch.load(self.kept, weights_only=True)
        if state["steps"] != self.total:
            say(f"{what}: begins anew, {self.kept} is of {state['steps']} steps and this is of {self.total}")
            return 0
        with torch.no_grad():
            for parameter, kept in zip(self.parameters, state["parameters"], strict=True):
                parameter.copy_(kept)
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        say(f"{what}: goes on behind step {state['step']} of {self.total}")
        return int(state["step"])


def images_of_step(count: int, step: int, size: int, seed: int = 0) -> Tensor:
    """Return which of `count` images a step is about, `size` of them; all come once before any comes again."""
    in_epoch = -(-count // size)
    epoch, at = divmod(step, in_epoch)
    order: Tensor = torch.randperm(count, generator=generator(seed, "images", epoch))
    return order[at * size : (at + 1) * size]
