"""E2E-QP (EfficientQAT): train the step sizes of the whole packed model, end to end.

Integers, zero points and everything else are frozen. The trainer is transformers' own `Trainer`; only the loss and
the optimizer's parameters differ, so resuming, schedules, logging, accumulation, checkpoint rotation and DeepSpeed
are those.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from torch import Tensor, nn
from torch.utils.data import Dataset

from eqat_mm.errors import TrainingError
from eqat_mm.quant.packed_linear import PackedLinear
from eqat_mm.runtime.memory import keep_freed_memory
from eqat_mm.runtime.precision import Precision, resolve
from eqat_mm.runtime.progress import interactive
from eqat_mm.train.losses import cross_entropy, kl_divergence, predictions_that_count

STAGE = "e2e-qp"


@dataclass(frozen=True)
class E2EQPConfig:
    """E2E-QP without the model and the data. The defaults are the paper's, for 2 bits and 7B parameters and up.

    Attributes:
        loss: `cross-entropy` (paper), or `kl` to the full-precision model's predictions.
        learning_rate: peak, of the step sizes (paper: 2e-5 at 2 bits, 1e-5 at 3 and 4).
        lr_floor: last learning rate as a fraction of the peak (cosine in between).
        warmup_steps: optimizer steps over which the learning rate rises.
        epochs: passes over the data.
        max_steps: optimizer steps; overrides `epochs` where it is given.
        batch_size: sequences per device and forward.
        accumulation: forwards per optimizer step.
        clip_norm: largest gradient norm.
        gradient_checkpointing: recompute activations of blocks in the backward.
        precision: of matrix products; `auto` takes bfloat16 where it is faster (see `runtime.precision`).
        logging_steps: optimizer steps between log lines.
        save_steps: optimizer steps between checkpoints to resume from; 0 keeps none.
        seed: of the order of the data.
    """

    loss: Literal["cross-entropy", "kl"] = "cross-entropy"
    learning_rate: float = 2e-5
    lr_floor: float = 0.05
    warmup_steps: int = 0
    epochs: float = 1.0
    max_steps: int | None = None
    batch_size: int = 2
    accumulation: int = 16
    clip_norm: float = 1.0
    gradient_checkpointing: bool = False
    precision: Precision = "auto"
    logging_steps: int = 8
    save_steps: int = 100
    seed: int = 0


class E2EQPTrainer(transformers.Trainer):
    """`Trainer` of the step sizes of a packed model.

    Args:
        teacher: full-precision model for the `kl` loss; None trains on `cross-entropy`.
        **kwargs: as for `transformers.Trainer`.
    """

    def __init__(self, *, teacher: nn.Module | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.teacher = None if teacher is None else teacher.to(self.args.device).eval().requires_grad_(False)
        self.model_accepts_loss_kwargs = True  # compute_loss averages over all sequences of a step

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Give the optimizer the step sizes, and nothing else."""
        if self.optimizer is None:
            assert isinstance(self.model, nn.Module)
            scales = scale_parameters(self.model)
            kind, options = self.get_optimizer_cls_and_kwargs(self.args)
            self.optimizer = kind([{"params": scales, "weight_decay": 0.0}], **options)
        return self.optimizer

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the mean loss per predicted token over the whole optimizer step."""
        columns, labels = predictions_that_count(inputs["labels"])
        forward = {name: value for name, value in inputs.items() if name != "labels"} | {"logits_to_keep": columns}
        outputs = model(**forward, use_cache=False)
        if self.teacher is None:
            loss = cross_entropy(outputs.logits, labels, num_items_in_batch)
        else:
            with torch.no_grad():
                wanted = self.teacher(**forward, use_cache=False).logits
            loss = kl_divergence(outputs.logits, wanted, labels, num_items_in_batch)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss


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
    data: Dataset[dict[str, Tensor]],
    config: E2EQPConfig,
    folder: Path,
    *,
    teacher: nn.Module | None,
    device: torch.device,
) -> list[dict[str, Any]]:
    """Train the step sizes of the packed `model` in place and round them to their storage dtype.

    Continues from the last Trainer checkpoint in `folder`, where there is one.

    Returns:
        The Trainer's log, one record per line.

    Raises:
        TrainingError: a step size or the loss is not finite at the end.
    """
    keep_freed_memory()
    arguments = training_arguments(config, folder, device)
    trainer = E2EQPTrainer(model=model, args=arguments, train_dataset=data, teacher=teacher)
    last = transformers.trainer_utils.get_last_checkpoint(str(folder)) if folder.is_dir() else None
    result = trainer.train(resume_from_checkpoint=last)
    _require_finite(model, result.training_loss, config)
    for module in model.modules():
        if isinstance(module, PackedLinear):
            module.round_scales()
    return list(trainer.state.log_history)


def training_arguments(config: E2EQPConfig, folder: Path, device: torch.device) -> transformers.TrainingArguments:
    """Translate the configuration for the Trainer."""
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
        bf16=resolve(config.precision, device) == "bfloat16",
        use_cpu=device.type == "cpu",
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


def _require_finite(model: nn.Module, loss: float, config: E2EQPConfig) -> None:
    broken = [
        path
        for path, module in model.named_modules()
        if isinstance(module, PackedLinear) and not module.weight_scale.isfinite().all()
    ]
    if broken or not math.isfinite(loss):
        raise TrainingError(
            where="E2E-QP" + (f", step sizes of {broken[0]}" if broken else ""),
            given=f"training loss {loss}, {len(broken)} linears with non-finite step sizes",
            allowed="finite numbers",
            do=f"lower --learning_rate (now {config.learning_rate:g}), or train with --precision float32",
        )
