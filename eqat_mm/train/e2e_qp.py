"""E2E-QP (EfficientQAT): train the step sizes of the whole packed model, end to end.

Integers, zero points and everything else are frozen; a vision-language model may train its projector as well. The
trainer is transformers' own `Trainer`; only the loss and the optimizer's parameters differ, so resuming, schedules,
logging, accumulation, checkpoint rotation and DeepSpeed are those.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from torch import Tensor, nn
from torch.utils.data import Dataset

from eqat_mm.checkpoint.adapters import adapter_parameters
from eqat_mm.data.batching import SampleOrder
from eqat_mm.errors import ConfigError, TrainingError
from eqat_mm.quant.packed_linear import PackedLinear
from eqat_mm.runtime.memory import keep_freed_memory
from eqat_mm.runtime.precision import Precision, autocast, resolve
from eqat_mm.runtime.progress import interactive
from eqat_mm.train.lora import LoRA
from eqat_mm.train.losses import cross_entropy, kl_divergence, predictions_that_count

STAGE = "e2e-qp"

Sample = dict[str, Tensor]
Trained = Literal["scales", "projector", "scales+projector", "lora", "lora+projector"]


@dataclass(frozen=True)
class E2EQPConfig:
    """E2E-QP without the model and the data. The defaults are the paper's, for 2 bits and 7B parameters and up.

    Attributes:
        trains: `scales` (step sizes), `projector` (of a vision-language model), `lora` (adapters on the frozen packed
            model: the baseline), or one of these with the projector.
        loss: `cross-entropy` (paper), or `kl` to the full-precision model's predictions.
        learning_rate: peak, of the step sizes (paper: 2e-5 at 2 bits, 1e-5 at 3 and 4).
        lr_projector: peak, of the projector; null takes `learning_rate`.
        lora: adapters of `trains: lora`, with their own learning rate.
        lr_floor: last learning rate as a fraction of the peak (cosine in between).
        warmup_steps: optimizer steps over which the learning rate rises.
        epochs: passes over the data.
        max_steps: optimizer steps; overrides `epochs` where it is given.
        batch_size: sequences per process and forward.
        accumulation: forwards per optimizer step.
        clip_norm: largest gradient norm.
        gradient_checkpointing: recompute activations of blocks in the backward.
        precision: of matrix products; `auto` takes bfloat16 where it is faster (see `runtime.precision`).
        deepspeed: JSON file with the settings of DeepSpeed, where a launcher started several processes; without one
            they run as plain data parallelism, and a single process needs none.
        logging_steps: optimizer steps between log lines.
        save_steps: optimizer steps between checkpoints to resume from; 0 keeps none.
        seed: of the order of the data.
    """

    trains: Trained = "scales"
    loss: Literal["cross-entropy", "kl"] = "cross-entropy"
    learning_rate: float = 2e-5
    lr_projector: float | None = None
    lora: LoRA = field(default_factory=LoRA)
    lr_floor: float = 0.05
    warmup_steps: int = 0
    epochs: float = 1.0
    max_steps: int | None = None
    batch_size: int = 2
    accumulation: int = 16
    clip_norm: float = 1.0
    gradient_checkpointing: bool = False
    precision: Precision = "auto"
    deepspeed: str | None = None
    logging_steps: int = 8
    save_steps: int = 100
    seed: int = 0


class E2EQPTrainer(transformers.Trainer):
    """`Trainer` of some parameters of a packed model.

    Args:
        groups: AdamW parameter groups, from `trainable_groups`.
        teacher: full-precision model for the `kl` loss; None trains on `cross-entropy`.
        order: of the samples; None shuffles them.
        projector: where it is trained; None otherwise.
        precision: of matrix products.
        **kwargs: as for `transformers.Trainer`.
    """

    def __init__(
        self,
        *,
        groups: list[dict[str, Any]],
        teacher: nn.Module | None = None,
        order: SampleOrder | None = None,
        projector: nn.Module | None = None,
        precision: Literal["float32", "bfloat16"] = "float32",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.groups = groups
        self.order = order
        self.projector = projector
        self.teacher = None if teacher is None else teacher.to(self.args.device).eval().requires_grad_(False)
        self.precision = precision
        self.model_accepts_loss_kwargs = True  # compute_loss averages over all sequences of a step

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Give the optimizer what is to be trained, and nothing else."""
        if self.optimizer is None:
            kind, options = self.get_optimizer_cls_and_kwargs(self.args)
            self.optimizer = kind(self.groups, **options)
        return self.optimizer

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return super()._get_train_sampler(train_dataset) if self.order is None else self.order

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Sample,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the mean loss per predicted token over the whole optimizer step."""
        columns, labels = predictions_that_count(inputs["labels"])
        forward = {name: value for name, value in inputs.items() if name != "labels"} | {"logits_to_keep": columns}
        with autocast(self.precision, columns.device), self._reached_projector("pixel_values" in inputs):
            outputs = model(**forward, use_cache=False)
        if self.teacher is None:
            loss = cross_entropy(outputs.logits, labels, num_items_in_batch)
        else:
            with torch.no_grad(), autocast(self.precision, columns.device):
                wanted = self.teacher(**forward, use_cache=False).logits
            loss = kl_divergence(outputs.logits, wanted, labels, num_items_in_batch)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    @contextmanager
    def _reached_projector(self, has_images: bool) -> Iterator[None]:
        """Let a batch without images give the projector gradients of zero, when and in the order images would.

        Data-parallel processes reduce gradients in the order they appear. Were they missing in one process, it would
        not meet the others; were they early, ZeRO-2 would add up different parameters.
        """
        if self.projector is None or has_images:
            yield
            return
        projector = self.projector
        features = next(parameter for parameter in projector.parameters() if parameter.dim() == 2).shape[1]

        def add_nothing(module: nn.Module, args: Any, embedded: Tensor) -> Tensor:
            nothing: Tensor = projector(embedded.new_zeros(1, features)).sum() * 0.0
            return embedded + nothing

        assert isinstance(self.model, transformers.PreTrainedModel)
        handle = self.model.get_input_embeddings().register_forward_hook(add_nothing)
        try:
            yield
        finally:
            handle.remove()


class _EpochOfOrder(transformers.TrainerCallback):
    """Tells the order which epoch begins: a continued run wraps the sampler where the Trainer does not find it."""

    def __init__(self, order: SampleOrder) -> None:
        self.order = order

    def on_epoch_begin(self, args: Any, state: transformers.TrainerState, control: Any, **kwargs: Any) -> None:
        self.order.set_epoch(int(state.epoch or 0))


class WindowDataset(Dataset[dict[str, Tensor]]):
    """Token windows as training samples; every token is a label.

    Args:
        windows: int64 [n, T].
    """

    def __init__(self, windows: Tensor) -> None:
        self.windows = windows

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.windows[index], "labels": self.windows[index]}


def run_e2e_qp(
    model: transformers.PreTrainedModel,
    data: Dataset[Sample],
    config: E2EQPConfig,
    arguments: transformers.TrainingArguments,
    *,
    teacher: nn.Module | None,
    projector: nn.Module | None = None,
    collator: transformers.DataCollator | None = None,
    order: SampleOrder | None = None,
) -> list[dict[str, Any]]:
    """Train the step sizes, or what `config.trains` says, of the packed `model` in place.

    Step sizes are rounded to their storage dtype at the end. Continues from the last Trainer checkpoint in the output
    folder of `arguments`, where there is one.

    Args:
        model: packed; with its adapters where these are to be trained.
        data: samples.
        config: settings.
        arguments: the same settings as `training_arguments` translates them.
        teacher: full-precision model, for the `kl` loss.
        projector: the part of `model` between vision tower and language model, where there is one.
        collator: makes a batch of samples; None stacks them.
        order: of the samples, over all processes; None shuffles them.

    Returns:
        The Trainer's log, one record per line.

    Raises:
        ConfigError: a projector is to be trained and there is none.
        TrainingError: a trained parameter or the loss is not finite at the end.
    """
    keep_freed_memory()
    groups = trainable_groups(model, projector, config)
    trainer = E2EQPTrainer(
        model=model,
        args=arguments,
        groups=groups,
        train_dataset=data,
        data_collator=collator,
        teacher=teacher,
        order=order,
        projector=projector if "projector" in config.trains else None,
        precision=resolve(config.precision, arguments.device),
    )
    if order is not None:
        trainer.add_callback(_EpochOfOrder(order))
    result = trainer.train(resume_from_checkpoint=_last_checkpoint(Path(str(arguments.output_dir))))
    _make_whole(model)
    _require_finite(model, result.training_loss, config)
    for module in model.modules():
        if isinstance(module, PackedLinear):
            module.round_scales()
    return list(trainer.state.log_history)


def training_arguments(config: E2EQPConfig, folder: Path, device: torch.device) -> transformers.TrainingArguments:
    """Translate the configuration for the Trainer; under a launcher this joins the other processes."""
    return transformers.TrainingArguments(
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
        activation_checkpointing=config.gradient_checkpointing,
        use_cpu=device.type == "cpu",
        deepspeed=config.deepspeed,
        ddp_find_unused_parameters=False,
        dataloader_pin_memory=device.type == "cuda",
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


def scale_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return the step sizes of every packed linear, as the modules name them."""
    return [p for module in model.modules() if isinstance(module, PackedLinear) for p in module.scale_parameters()]


def trainable_groups(model: nn.Module, projector: nn.Module | None, config: E2EQPConfig) -> list[dict[str, Any]]:
    """Return AdamW parameter groups of what is trained, and make exactly these parameters trainable.

    Raises:
        ConfigError: a projector is to be trained and there is none.
    """
    wanted = config.trains.split("+")
    groups: list[dict[str, Any]] = []
    if "scales" in wanted:
        groups.append({"params": scale_parameters(model), "weight_decay": 0.0})
    if "lora" in wanted:
        rate = config.lora.learning_rate
        groups.append({"params": adapter_parameters(model), "lr": rate, "weight_decay": 0.0})
    if "projector" in wanted:
        if projector is None:
            raise ConfigError(
                where="--trains",
                given=f"{config.trains}, of a model without a projector",
                allowed="scales or lora",
                do="train the step sizes, or choose a vision-language model",
            )
        rate = config.learning_rate if config.lr_projector is None else config.lr_projector
        groups.append({"params": list(projector.parameters()), "lr": rate, "weight_decay": 0.0})
    model.requires_grad_(False)
    for parameter in (parameter for group in groups for parameter in group["params"]):
        parameter.requires_grad_(True)
    return groups


def _last_checkpoint(folder: Path) -> str | None:
    """Return the last checkpoint of the Trainer that is complete, if any: its state is what it writes last."""
    complete = [path.parent for path in folder.glob("checkpoint-*/trainer_state.json")]
    return str(max(complete, key=lambda path: int(path.name.rpartition("-")[2]))) if complete else None


@torch.no_grad()
def _make_whole(model: nn.Module) -> None:
    """Give every process the whole parameters, which ZeRO-3 leaves in parts."""
    for parameter in model.parameters():
        if hasattr(parameter, "ds_id"):
            import deepspeed

            with deepspeed.zero.GatheredParameters([parameter]):
                whole = parameter.detach().clone()
            parameter.data = whole


def _require_finite(model: nn.Module, loss: float, config: E2EQPConfig) -> None:
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    broken = [name for name, parameter in trained if not parameter.isfinite().all()]
    if broken or not math.isfinite(loss):
        raise TrainingError(
            where="E2E-QP" + (f", {broken[0]}" if broken else ""),
            given=f"training loss {loss}, {len(broken)} of {len(trained)} trained tensors not finite",
            allowed="finite numbers",
            do=f"lower --learning_rate (now {config.learning_rate:g}), or train with --precision float32",
        )
