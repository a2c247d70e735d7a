"""A trainer that says how it goes: its pace, and how good its model is on samples that it does not learn from."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import transformers
from torch import Tensor, nn

from eqat_mm.runtime.precision import Decided
from eqat_mm.runtime.progress import say
from eqat_mm.train.guarded import GuardedTrainer
from eqat_mm.train.held_out import HeldOut, logits_at, numbers_of
from eqat_mm.train.watch import Console, Pace, Watch

Sample = dict[str, Tensor]


class WatchedTrainer(GuardedTrainer):
    """`GuardedTrainer` with a clock and a judge.

    Args:
        precision: of matrix products.
        watch: who is told of its numbers, beside the console.
        held_out: samples to judge the model by; None has none.
        keep_best: note what was trained where it was best on these.
        **kwargs: as for `GuardedTrainer`.
    """

    def __init__(
        self,
        *,
        precision: Decided,
        watch: Watch | None = None,
        held_out: HeldOut | None = None,
        keep_best: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.precision = precision
        self.pace = Pace()
        self.add_callback(_Clock(self.pace))
        Console.replace(self, watch or Watch())
        self.held_out, self.keep_best = held_out, keep_best
        if held_out is not None:
            self.add_callback(_Judge(self))

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Go forward and backward, and count the tokens."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.pace.see(inputs)
        return loss

    def log(self, logs: dict[str, Any], start_time: float | None = None) -> None:
        """Log how fast the run goes, too; all processes do at once."""
        if "loss" in logs:
            tokens = self.accelerator.reduce(self.pace.tokens.to(self.args.device), "sum")
            logs |= self.pace.look(int(tokens), self.state, self.args.device)
        super().log(logs, start_time)

    def judge(self) -> None:
        """Log loss and KL on the samples that are held out; all processes do at once."""
        assert self.model is not None
        assert self.held_out is not None
        model: nn.Module = self.model
        training = model.training

        def predict(batch: Sample, columns: Tensor) -> Tensor:
            with self.around_forward(model, batch):
                return logits_at(model, batch, columns, self.precision)

        model.eval()
        sums = self.accelerator.reduce(self.held_out.sums(predict, self.args.device), "sum")
        model.train(training)
        self.log(numbers_of(sums.tolist(), compared=self.held_out.wanted is not None))
        if self.keep_best and self._best() is self.state.log_history[-1]:
            self.note_best(self.state.global_step)

    def take_best(self) -> None:
        """End with what was best on the samples that are held out, if it is not the last."""
        best = self._best() if self.keep_best else None
        if best is not None and best["step"] < self.state.global_step and self.take_noted(best["step"]):
            say(f"{self.stage}: what is kept is of step {best['step']}, held-out loss {best['held_out_loss']:.4f}")

    def _best(self) -> dict[str, Any] | None:
        judged = [record for record in self.state.log_history if math.isfinite(record.get("held_out_loss", math.nan))]
        return min(judged, key=lambda record: record["held_out_loss"], default=None)

    def around_forward(self, model: nn.Module, inputs: Sample) -> AbstractContextManager[None]:
        """Return the context in which a model, trained or teacher, sees a batch; nothing special by default."""
        return nullcontext()


class _Judge(transformers.TrainerCallback):
    """Lets a trainer be judged before its first step, now and then, and behind its last."""

    def __init__(self, trainer: WatchedTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: transformers.TrainerState, control: Any, **kwargs: Any) -> None:
        if state.global_step == 0:
            self.trainer.judge()

    def on_step_end(self, args: Any, state: transformers.TrainerState, control: Any, **kwargs: Any) -> None:
        assert self.trainer.held_out is not None
        if state.global_step % self.trainer.held_out.every == 0 or state.global_step == state.max_steps:
            due = control.should_log  # which a log unsets
            self.trainer.judge()
            control.should_log = due


class _Clock(transformers.TrainerCallback):
    """Starts the clock when training does."""

    def __init__(self, pace: Pace) -> None:
        self.pace = pace

    def on_train_begin(self, args: Any, state: transformers.TrainerState, control: Any, **kwargs: Any) -> None:
        self.pace.begin(state.global_step)
