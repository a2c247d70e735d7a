"""What the end-to-end trainers share: E2E-QP, which trains step sizes, and LLM-QAT, which trains weights.

The trainer is transformers' own `Trainer` with another loss and other parameters in the optimizer; schedules,
accumulation and DeepSpeed are those. What a killed run continues from is ours (`train.resumable`), and so is what
happens to steps that are not finite (`train.guarded`), and what is said of the others (`train.watched`).
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from traceback import clear_frames
from typing import Any, Literal, Self

import torch
import transformers
from torch import Tensor, nn
from torch.utils.data import Dataset

from eqat_mm.errors import ConfigError
from eqat_mm.runtime.precision import Decided, Precision
from eqat_mm.runtime.progress import interactive, say
from eqat_mm.runtime.reporting import ReportTo
from eqat_mm.runtime.settings import Count, CountOrZero, Fraction, Positive, Seed, Settings
from eqat_mm.train.held_out import logits_at
from eqat_mm.train.imageless import adding_nothing, seeing
from eqat_mm.train.losses import cross_entropy, kl_divergence, predictions_that_count
from eqat_mm.train.order import Filled, Order, Shuffled
from eqat_mm.train.parallel import divides_parameters, keep_precision, make_whole, placed, use_one_device
from eqat_mm.train.watched import Sample as Sample
from eqat_mm.train.watched import WatchedTrainer

_WORKERS = 4


@dataclass(frozen=True)
class EndToEndConfig(Settings):
    """How a whole model is trained, whatever is trained of it.

    Attributes:
        learning_rate: peak learning rate.
        lr_floor: last learning rate as a fraction of the peak (cosine in between).
        warmup_steps: optimizer steps over which the learning rate rises.
        epochs: passes over the data.
        max_steps: optimizer steps; overrides `epochs` where it is given.
        batch_size: sequences per process and forward.
        accumulation: forwards per optimizer step.
        global_batch: sequences per optimizer step of all processes together; `accumulation` then follows from it, so
            that a run is the same, and can go on, with any number of processes.
        clip_norm: largest gradient norm.
        gradient_checkpointing: recompute activations in the backward; more time, much less memory. `auto` does so on
            a GPU, for models of a billion weights and more.
        precision: of matrix products; `auto` takes bfloat16 where it is faster.
        deepspeed: DeepSpeed's settings, `zero-2` or a JSON file, where a launcher started several processes; without
            them these run as plain data parallelism, and a single process needs none.
        logging_steps: optimizer steps between log lines.
        report_to: dashboard that is given the same numbers: `none`, `tensorboard` or `wandb`, which must be installed.
        save_steps: optimizer steps between checkpoints to resume from; 0 keeps none.
        held_out_steps: optimizer steps between two looks at held-out conversations, where there are any.
        held_out_kl: compare them with the full-precision model, too, which is read once for that.
        keep_best: end with the step whose loss on held-out conversations was least, instead of the last.
        dataloader_num_workers: processes that read samples for each one that trains; by default 4 on a GPU, and none
            on a CPU, whose cores train.
        seed: of the order of the data.
    """

    learning_rate: Positive = 2e-5
    lr_floor: Fraction = 0.05
    warmup_steps: CountOrZero = 0
    epochs: Positive = 1.0
    max_steps: Count | None = None
    batch_size: Count = 2
    accumulation: Count = 16
    global_batch: Count | None = None
    clip_norm: Positive = 1.0
    gradient_checkpointing: bool | Literal["auto"] = "auto"
    precision: Precision = "auto"
    deepspeed: str | None = None
    logging_steps: Count = 8
    report_to: ReportTo = "none"
    save_steps: CountOrZero = 100
    held_out_steps: Count = 100
    held_out_kl: bool = True
    keep_best: bool = False
    dataloader_num_workers: CountOrZero | None = None
    seed: Seed = 0

    def check_together(self) -> None:
        """Check that the learning rate has risen before the run ends."""
        if self.max_steps:
            self._check_warmup(self.max_steps)

    def among(self, processes: int) -> Self:
        """Return these settings for a number of processes: `accumulation` follows from `global_batch`, if it is given.

        Raises:
            ConfigError: the batches of all processes do not divide it.
        """
        if self.global_batch is None:
            return self
        forward = self.batch_size * processes
        accumulation, rest = divmod(self.global_batch, forward)
        if rest:
            raise ConfigError(
                where=f"--global_batch {self.global_batch}",
                given=f"forwards of {forward} samples: --batch_size {self.batch_size} in each of {processes} processes",
                allowed=f"a multiple of {forward}: every forward of a step is full",
                do=self._mended_batch(self.global_batch, processes),
            )
        if self.accumulation not in (accumulation, type(self).accumulation):
            say(
                f"--global_batch {self.global_batch} in {processes} processes is --accumulation {accumulation}, "
                f"not {self.accumulation}"
            )
        return replace(self, accumulation=accumulation)

    def _mended_batch(self, wanted: int, processes: int) -> str:
        each, uneven = divmod(wanted, processes)
        if uneven:
            return f"--global_batch {math.ceil(wanted / processes) * processes}, or another number of processes"
        return f"--batch_size {max(size for size in range(1, self.batch_size + 1) if each % size == 0)}"

    def check_warmup_of(self, samples: int, processes: int) -> None:
        """Check that the learning rate has risen before a run on so many samples ends.

        Raises:
            ConfigError: it has not.
        """
        if self.max_steps is None:
            forwards = math.ceil(samples / (self.batch_size * processes))
            self._check_warmup(math.ceil(self.epochs * math.ceil(forwards / self.accumulation)))

    def _check_warmup(self, steps: int) -> None:
        if self.warmup_steps > steps:
            raise ConfigError(
                where="--warmup_steps",
                given=f"{self.warmup_steps}, in a run of {steps} steps",
                allowed=f"an integer, 0 to {steps}",
                do="lower --warmup_steps, or train longer with --max_steps or --epochs",
            )


class EndToEndTrainer(WatchedTrainer):
    """`Trainer` of some parameters of a model, on labels or on a teacher's predictions.

    Args:
        groups: AdamW parameter groups of what is trained.
        teacher: full-precision model whose predictions are learned; None trains on the labels. Under ZeRO-3 it is
            divided among the processes as what is trained is; otherwise each has the whole.
        order: of the samples; None shuffles them.
        blank: tensors of an image without content, where some batches have images and others none; under ZeRO-3 these
            are shown it, for all processes gather the vision tower at once. None otherwise.
        precision: of matrix products.
        **kwargs: as for `WatchedTrainer`; `args` from `training_arguments`.
    """

    def __init__(
        self,
        *,
        groups: list[dict[str, Any]],
        teacher: nn.Module | None = None,
        order: Order | None = None,
        blank: Sample | None = None,
        precision: Decided = "float32",
        **kwargs: Any,
    ) -> None:
        keep_precision(kwargs["args"], precision)
        super().__init__(teacher=None, precision=precision, **kwargs)
        self.groups = groups
        self.order = Shuffled(len(self.samples), self.args.seed) if order is None else order
        self.teacher = None if teacher is None else placed(teacher.eval().requires_grad_(False), self.args, precision)
        self.blank = blank if divides_parameters(self.args) else None
        self.model_accepts_loss_kwargs = True  # compute_loss averages over all sequences of a step
        self.add_callback(_EpochOfOrder(self.order))

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Give the optimizer what is to be trained, and nothing else."""
        if self.optimizer is None:
            kind, options = self.get_optimizer_cls_and_kwargs(self.args)
            self.optimizer = kind(self.groups, **options)
        return self.optimizer

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Save tensors as they are in memory: what a run continues from is no packed checkpoint."""
        assert self.model is not None
        super()._save(output_dir, self.model.state_dict() if state_dict is None else state_dict)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        processes = self.args.world_size
        return self.order if processes == 1 else Filled(self.order, processes * self.args.per_device_train_batch_size)

    def around_forward(self, model: nn.Module, inputs: Sample) -> AbstractContextManager[None]:
        """Let a batch without images reach all that ZeRO-3 gathers."""
        if self.blank is None or "pixel_values" in inputs:
            return nullcontext()
        model = getattr(model, "module", model)  # of the engine that a teacher is in
        return adding_nothing(model, seeing(model, self.blank))

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Sample,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the mean loss per predicted token over the whole optimizer step."""
        columns, labels = predictions_that_count(inputs["labels"])
        assert self.model is not None
        with self.around_forward(self.model, inputs):
            logits = logits_at(model, inputs, columns, self.precision)
        if self.teacher is None:
            loss = cross_entropy(logits, labels, num_items_in_batch)
        else:
            with torch.no_grad(), self.around_forward(self.teacher, inputs):
                wanted = logits_at(self.teacher, inputs, columns, self.precision)
            loss = kl_divergence(logits, wanted, labels, num_items_in_batch)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes
        loss = loss * torch.where(loss.detach().isfinite(), 1.0, math.nan)  # gradients then tell all processes
        return (loss, logits) if return_outputs else loss


class _EpochOfOrder(transformers.TrainerCallback):
    """Tells the order which epoch begins: a continued run wraps the sampler where the Trainer does not find it."""

    def __init__(self, order: Order) -> None:
        self.order = order

    def on_epoch_begin(self, args: Any, state: transformers.TrainerState, control: Any, **kwargs: Any) -> None:
        self.order.set_epoch(int(state.epoch or 0))


class WindowDataset(Dataset[Sample]):
    """Token windows as training samples; every token is a label.

    Args:
        windows: int64 [n, T].
    """

    def __init__(self, windows: Tensor) -> None:
        self.windows = windows

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> Sample:
        return {"input_ids": self.windows[index], "labels": self.windows[index]}


def run_trainer(trainer: EndToEndTrainer) -> list[dict[str, Any]]:
    """Train, from the last whole checkpoint in the Trainer's folder where there is one; a finished run is only loaded.

    Args:
        trainer: ready to train; every process gets the whole parameters at the end.

    Returns:
        The Trainer's log, one record per line.

    Raises:
        ConfigError: the checkpoint is of another kind of run.
        TrainingError: the model or the data are not finite, or too many steps were not.
    """
    assert isinstance(trainer.model, nn.Module)
    path, facts = trainer.last_checkpoint() or (None, None)
    if path is not None and facts is not None and facts.step >= facts.total:
        trainer.take_over(path)
    else:
        _train(trainer, path)
        make_whole(trainer.model)
    trainer.take_best()
    trainer.require_steps()
    trainer.require_finite()
    return list(trainer.state.log_history)


def _train(trainer: EndToEndTrainer, path: Path | None) -> None:
    try:
        trainer.train(resume_from_checkpoint=None if path is None else str(path))
    except BaseException as error:
        clear_frames(error.__traceback__)  # they hold the loader, whose processes would live as long as the error does
        raise


def training_arguments(config: EndToEndConfig, folder: Path, device: torch.device) -> transformers.TrainingArguments:
    """Translate the configuration for the Trainer; under a launcher this joins the other processes."""
    usual = _WORKERS if device.type == "cuda" else 0
    workers = usual if config.dataloader_num_workers is None else config.dataloader_num_workers
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.accumulation,
        num_train_epochs=config.epochs,
        max_steps=-1 if config.max_steps is None else config.max_steps,
        learning_rate=config.learning_rate,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": config.lr_floor},
        warmup_steps=config.warmup_steps,
        optim="adamw_torch_fused",
        weight_decay=0.0,
        max_grad_norm=config.clip_norm,
        activation_checkpointing=config.gradient_checkpointing is True,  # `auto` is decided once the model is there
        use_cpu=device.type == "cpu",
        deepspeed=config.deepspeed,
        ddp_find_unused_parameters=False,
        ddp_broadcast_buffers=False,  # packed integers, gigabytes that never change
        dataloader_pin_memory=device.type == "cuda",
        dataloader_num_workers=workers,
        remove_unused_columns=False,
        logging_steps=config.logging_steps,
        logging_nan_inf_filter=False,
        save_strategy="steps" if config.save_steps else "no",
        save_steps=config.save_steps or 500,
        save_total_limit=2,
        report_to="none",
        disable_tqdm=not interactive(),
        seed=config.seed,
    )
    use_one_device(arguments, device)
    return arguments


def train_only(model: nn.Module, groups: list[dict[str, Any]]) -> None:
    """Make exactly the parameters of AdamW's `groups` trainable, in float32: in 16 bits small updates vanish."""
    model.requires_grad_(False)
    for parameter in (parameter for group in groups for parameter in group["params"]):
        parameter.data = parameter.data.float()
        parameter.requires_grad_(True)
