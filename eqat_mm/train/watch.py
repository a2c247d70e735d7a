"""Watching an end-to-end trainer: lines on the console, the same numbers live in metrics.jsonl and on a dashboard."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from eqat_mm.runtime.files import append_jsonl, write_jsonl
from eqat_mm.runtime.memory import peak_bytes
from eqat_mm.runtime.progress import interactive, pace, place, say
from eqat_mm.runtime.reporting import SILENT, Reporter


@dataclass(frozen=True)
class Watch:
    """Who is told of a run's numbers, beside the console.

    Attributes:
        file: a record per line of the log, from the first step of the run on; None writes none.
        reporter: takes the same numbers.
    """

    file: Path | None = None
    reporter: Reporter = SILENT

    def begin(self, records: list[dict[str, Any]]) -> None:
        """Write what was logged before this start; what came behind the checkpoint will come again."""
        if self.file is not None:
            write_jsonl(self.file, records)
        self.reporter.begin(max((record["step"] for record in records), default=-1))

    def add(self, step: int, record: dict[str, Any]) -> None:
        """Tell of a record."""
        if self.file is not None:
            append_jsonl(self.file, record)
        self.reporter.add(step, record)


@dataclass
class Pace:
    """How fast a run goes, since this start of it.

    Attributes:
        tokens: seen by this process since the last look; it stays on its device until then.
        first: optimizer steps that earlier starts took.
    """

    tokens: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.int64))
    first: int = 0
    started: float = field(default_factory=time.monotonic)
    looked: float = field(default_factory=time.monotonic)

    def begin(self, step: int) -> None:
        """Start the clock at a step."""
        self.first, self.started = step, time.monotonic()
        self.looked = self.started

    def see(self, inputs: dict[str, Any]) -> None:
        """Count the tokens of a batch, padding left out."""
        mask = inputs.get("attention_mask")
        self.tokens = self.tokens + (inputs["input_ids"].numel() if mask is None else mask.sum())

    def look(self, tokens: int, state: transformers.TrainerState, device: torch.device) -> dict[str, Any]:
        """Return what the log says of the time since the last look.

        Args:
            tokens: that all processes have seen since.
            state: where the run is.
            device: whose memory is looked at.
        """
        now = time.monotonic()
        seconds, self.looked = now - self.looked, now
        self.tokens = torch.zeros_like(self.tokens)
        done = max(1, state.global_step - self.first)
        return {
            "tokens_per_second": tokens / max(seconds, 1e-9),
            "eta_seconds": (now - self.started) / done * (state.max_steps - state.global_step),
            "peak_bytes": peak_bytes(device),
        }


class Console(transformers.TrainerCallback):
    """Says and writes what is logged, in the first process.

    Args:
        watch: who is told.
    """

    def __init__(self, watch: Watch) -> None:
        self.watch = watch

    @classmethod
    def replace(cls, trainer: transformers.Trainer, watch: Watch) -> None:
        """Let a trainer talk in this way instead of the library's; on a terminal its bar stays."""
        trainer.remove_callback(PrinterCallback)
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(cls(watch))
        if interactive():
            trainer.add_callback(_Bar())

    def on_train_begin(self, args: Any, state: transformers.TrainerState, control: Any, **kwargs: Any) -> None:
        """Take up the log where it was."""
        if state.is_world_process_zero:
            self.watch.begin(state.log_history)

    def on_log(self, args: Any, state: transformers.TrainerState, control: Any, **kwargs: Any) -> None:
        """Say and write the newest record."""
        if not state.is_world_process_zero:
            return
        record = state.log_history[-1]
        self.watch.add(state.global_step, record)
        if "loss" in record:
            say(line_of(record, state.max_steps))
        elif "held_out_loss" in record:
            kl = f"  KL {record['held_out_kl']:.4f}" if "held_out_kl" in record else ""
            at = place("step", state.global_step, state.max_steps)
            say(f"{at}  held out  loss {record['held_out_loss']:.4f}{kl}")


class _Bar(ProgressCallback):
    def on_log(self, *args: Any, **kwargs: Any) -> None:
        """Say nothing: `Console` does."""


def line_of(record: dict[str, Any], total: int) -> str:
    """Return a record of the log as one line.

    Args:
        record: with `loss` and what `Pace.look` returns.
        total: optimizer steps of the whole run.
    """
    loss = "-" if record["loss"] is None else f"{record['loss']:.4f}"
    return f"{place('step', record['step'], total)}  loss {loss}  {pace(record)}"
