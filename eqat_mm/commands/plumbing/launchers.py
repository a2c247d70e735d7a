"""What a job does differently where a launcher started several copies of it."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers
from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

from eqat_mm.commands.plumbing.deepspeed_file import DeepSpeedFile
from eqat_mm.commands.plumbing.runs import asked, opened_run, settings, settled
from eqat_mm.plan.verdict import Verdict
from eqat_mm.runtime.device import launched
from eqat_mm.runtime.launcher import release_shared_names
from eqat_mm.runtime.place import Place
from eqat_mm.runtime.precision import resolve
from eqat_mm.runtime.progress import say
from eqat_mm.runtime.reporting import reported
from eqat_mm.runtime.run import Run
from eqat_mm.train.end_to_end import EndToEndConfig, training_arguments
from eqat_mm.train.watch import Watch

Job = TypeVar("Job", bound=EndToEndConfig)

_OF_LAUNCHERS = ("e2e-qp", "llm-qat")
"""Commands that train on all GPUs where a launcher starts them."""


def free_port() -> int:
    """Return a port that is free now: a launcher's own choice is always the same."""
    with socket.socket() as free:
        free.bind(("", 0))
        port: int = free.getsockname()[1]
    return port


@contextmanager
def training_run(
    job: Job,
    place: Place,
    command: str,
    inputs: dict[str, Path | str],
    device: torch.device,
    deepspeed: DeepSpeedFile | None,
    room: int,
    plan: Verdict | None = None,
) -> Iterator[tuple[Job, transformers.TrainingArguments, Run]]:
    """Begin or continue a run, the first process before the others.

    Args:
        job: what is trained and how, with `overwrite`.
        place: of the run.
        command: for the record.
        inputs: folders and hashes of what it reads.
        device: to train on.
        deepspeed: `deepspeed_settings` of the job.
        room: bytes that it will write at most.
        plan: what it was said to need.

    Yields:
        The job with its precision decided, the Trainer's arguments, and the run.

    Raises:
        EqatError: as `Run.open`; or the disk has no room.
    """

    def prepare(run: Run) -> dict[str, Any]:
        run.require_room(room, "checkpoints")
        return {} if plan is None else {"plan": plan.phase.totals}

    shared = replace(job, deepspeed=None if deepspeed is None else str(deepspeed))
    say_which_gpu(command, device)
    arguments = training_arguments(shared, place.folder / "trainer", device)
    with ExitStack() as stack:
        with arguments.main_process_first(local=False):
            job = settled(job, place, {"precision": lambda: resolve("auto", device)})
            wanted = asked(command, job, device, inputs, samples_per_step=_samples_per_step(arguments))
            run = stack.enter_context(
                opened_run(
                    place,
                    wanted,
                    prepare,
                    overwrite=getattr(job, "overwrite", False),
                    from_first=lambda begin: begin() if arguments.process_index == 0 else None,
                )
            )
        stack.callback(release_shared_names)
        yield job, arguments, run


def _samples_per_step(arguments: transformers.TrainingArguments) -> int:
    alone = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps
    return int(alone * arguments.world_size)


def say_which_gpu(command: str, device: torch.device) -> None:
    """Say on which of several GPUs a process trains that no launcher started, and how to use all of them."""
    gpus = torch.cuda.device_count() if device.type == "cuda" and command in _OF_LAUNCHERS and not launched() else 1
    if gpus > 1:
        words = f"deepspeed --num_gpus {gpus} --module eqat_mm {command} --deepspeed zero-2"
        say(f"{command} on {device}, one of {gpus} GPUs; on all of them, with the same options: {words}")


@contextmanager
def watched(job: EndToEndConfig, folder: Path) -> Iterator[Watch]:
    """Let the numbers of a run be seen: live in `metrics.jsonl`, and where the job reports them to."""
    with reported(job.report_to, folder, settings(job)) as reporter:
        yield Watch(folder / "metrics.jsonl", reporter)


@contextmanager
def whole_models(arguments: transformers.TrainingArguments) -> Iterator[None]:
    """Let transformers make whole models: under ZeRO-3 it scatters their parameters as soon as they exist."""
    config: Any = getattr(arguments, "hf_deepspeed_config", None)
    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if config is not None:
            set_hf_deepspeed_config(config)
