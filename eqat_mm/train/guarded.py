"""A trainer that skips steps whose loss or gradient is not finite, and ends when there are too many of them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from accelerate.utils import gather_object
from torch import Tensor, nn

from eqat_mm.errors import TrainingError
from eqat_mm.runtime.progress import say
from eqat_mm.train.checkpoints import checkpoints_in
from eqat_mm.train.non_finite import (
    Count,
    Remembered,
    broken_samples,
    broken_tensor,
    diverged,
    first_non_finite,
)
from eqat_mm.train.order import WithBlank
from eqat_mm.train.parallel import here
from eqat_mm.train.resumable import ResumableTrainer


class GuardedTrainer(ResumableTrainer):
    """`ResumableTrainer` that only finite numbers change, and that saves only finite numbers.

    Args:
        stage: name of the method, for messages.
        teacher: what else gives numbers, or None.
        **kwargs: as for `transformers.Trainer`.
    """

    def __init__(self, *, stage: str = "training", teacher: nn.Module | None, **kwargs: Any) -> None:
        args: transformers.TrainingArguments = kwargs["args"]
        ahead = 3 * args.per_device_train_batch_size * args.gradient_accumulation_steps  # a batch is read early
        self.samples = Remembered(kwargs["train_dataset"], ahead)
        kwargs["train_dataset"] = WithBlank(self.samples)
        super().__init__(**kwargs)
        self.stage = stage
        self.teacher = teacher
        self.step = 0
        self.count = Count()
        self.micro_batches: list[tuple[Tensor, Tensor]] = []
        self.loss_before = torch.zeros(())
        self.add_callback(_StepBegins(self))

    @property
    def where(self) -> str:
        """Stage and step, for messages."""
        return f"{self.stage}, optimizer step {self.step}"

    @property
    def untrained(self) -> bool:
        """Whether no step of this run was ever taken, in an earlier start of it either."""
        return not self.count.taken and self.state.global_step <= self.count.skipped

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Go forward and backward, and remember what came out of which tokens."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.micro_batches.append((inputs["input_ids"], loss))
        return loss

    def log(self, logs: dict[str, Any], start_time: float | None = None) -> None:
        """Log the mean over the steps that were taken, and how many were skipped."""
        self.count.correct(logs)
        super().log(logs, start_time)

    def require_finite(self) -> None:
        """Check what is trained; all processes do at once.

        Raises:
            TrainingError: names a tensor, and the last checkpoint, which is finite.
        """
        name = self._first(self.trained())
        if name is not None:
            raise self._diverged(name, "a trained tensor that is not finite, behind a step whose gradients were")

    def require_steps(self) -> None:
        """Check, at the end, that something was trained; say what was skipped.

        Raises:
            TrainingError: every step was skipped.
        """
        if self.count.skipped and self.untrained:
            raise self._broken_samples()
        if self.count.skipped:
            say(f"{self.stage}: {self.count.skipped} steps were skipped, their loss or gradient was not finite")

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm)  # type: ignore[no-untyped-call]
        self.count.add(finite=norm is None or math.isfinite(norm))
        if self.count.in_a_row:
            self._skip()
        return norm

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self.require_finite()
        super()._save_checkpoint(model, trial)

    def _skip(self) -> None:
        """Let the optimizer step that follows change nothing; DeepSpeed has seen to that itself."""
        assert self.optimizer is not None
        gradients = ((name, value.grad) for name, value in self.trained() if value.grad is not None)
        name = first_non_finite(gradients)
        self.optimizer.zero_grad()
        self._tr_loss.copy_(self.loss_before)
        if self.count.skipped == 1:
            self._require_sound_model()
            say(f"{self.where} is skipped: its loss or gradient is not finite")
        if self.count.too_many:
            raise self._too_many(name)

    def _require_sound_model(self) -> None:
        """Raise where training is not to blame: a tensor that it has not touched is not finite."""
        name = self._first(self._tensors(trained=self.untrained))
        if name is not None:
            raise broken_tensor(self.where, name)

    def _tensors(self, *, trained: bool) -> Iterator[tuple[str, Tensor]]:
        assert isinstance(self.model, nn.Module)
        yield from self.model.named_buffers()
        yield from (
            (name, value) for name, value in self.model.named_parameters() if trained or not value.requires_grad
        )
        if self.teacher is not None:
            yield from ((f"the teacher's {name}", value) for name, value in self.teacher.named_parameters())

    def _too_many(self, gradient: str | None) -> TrainingError:
        if self.untrained:
            return self._broken_samples()
        count = self.count
        given = f"{count.in_a_row} steps in a row, {count.skipped} in total, whose loss or gradient is not finite"
        return self._diverged("" if gradient is None else f"gradient of {gradient}", given)

    def _broken_samples(self) -> TrainingError:
        bad = [ids for ids, loss in self.micro_batches if not loss.isfinite()]
        return broken_samples(self.where, self.samples.numbers_of(bad), self.count.skipped)

    def _diverged(self, tensor: str, given: str) -> TrainingError:
        kept = next(iter(checkpoints_in(self.folder)), None)
        where = ", ".join(filter(None, (self.where, tensor)))
        return diverged(where, given, self.args.learning_rate, kept)

    def _first(self, tensors: Iterator[tuple[str, Tensor]]) -> str | None:
        """Return the name of a tensor that is not finite in some process."""
        found = gather_object([first_non_finite((name, here(value)) for name, value in tensors)])
        return next((name for name in found if name is not None), None)


class _StepBegins(transformers.TrainerCallback):
    """Notes what a step that is skipped goes back to, and lets the schedule of learning rates pass it."""

    def __init__(self, trainer: GuardedTrainer) -> None:
        self.trainer = trainer

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.step = state.global_step + 1
        self.trainer.micro_batches.clear()
        self.trainer.loss_before = self.trainer._tr_loss.clone()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer.accelerator.optimizer_step_was_skipped:  # by DeepSpeed: the Trainer then holds the schedule
            kwargs["lr_scheduler"].step()
