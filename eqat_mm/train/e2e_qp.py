"""E2E-QP (EfficientQAT): train the step sizes of the whole packed model, end to end.

Integers, zero points and everything else are frozen; a vision-language model may train its projector as well.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Literal

import transformers
from torch import nn
from torch.utils.data import Dataset

from eqat_mm.checkpoint.adapters import adapter_parameters
from eqat_mm.errors import ConfigError
from eqat_mm.quant.packed_linear import PackedLinear
from eqat_mm.runtime.memory import keep_freed_memory
from eqat_mm.runtime.precision import resolve
from eqat_mm.runtime.settings import Positive
from eqat_mm.train.end_to_end import EndToEndConfig, EndToEndTrainer, Sample, run_trainer, train_only
from eqat_mm.train.held_out import HeldOut
from eqat_mm.train.imageless import adding_nothing, through
from eqat_mm.train.lora import LoRA
from eqat_mm.train.losses import Loss
from eqat_mm.train.order import Order
from eqat_mm.train.recompute import recompute_where_it_pays
from eqat_mm.train.watch import Watch

STAGE = "e2e-qp"

Trained = Literal["scales", "projector", "scales+projector", "lora", "lora+projector"]
_TRAINED: dict[Trained, frozenset[Literal["scales", "projector", "lora"]]] = {
    "scales": frozenset({"scales"}),
    "projector": frozenset({"projector"}),
    "scales+projector": frozenset({"scales", "projector"}),
    "lora": frozenset({"lora"}),
    "lora+projector": frozenset({"lora", "projector"}),
}


@dataclass(frozen=True)
class E2EQPConfig(EndToEndConfig):
    """E2E-QP without the model and the data. The defaults are the paper's, for 2 bits and 7B parameters and up.

    `learning_rate` is that of the step sizes (paper: 2e-5 at 2 bits, 1e-5 at 3 and 4).

    Attributes:
        trains: what is trained: `scales` (step sizes), `projector` (of a vision-language model), `lora` (adapters on
            the frozen packed model: the baseline), or one of these with the projector.
        loss: what is learned: `cross-entropy` (paper), or `kl` to the full-precision model's predictions.
        teacher: where these come from. `memory`: the full-precision model is there, too. `cache`: its last hidden
            states are kept in a file beside the run folder, for text on a language model; runs on the same text share
            it. `auto` takes `cache` where that file has at most 8 GiB and all of the text is read.
        lr_projector: peak learning rate of the projector; null takes `learning_rate`.
        lora: adapters of `trains: lora`, with their own learning rate.
    """

    trains: Trained = "scales"
    loss: Loss = "cross-entropy"
    teacher: Literal["auto", "memory", "cache"] = "auto"
    lr_projector: Positive | None = None
    lora: LoRA = field(default_factory=LoRA)

    @property
    def trained(self) -> frozenset[Literal["scales", "projector", "lora"]]:
        """What `trains` names, one by one."""
        return _TRAINED[self.trains]


class E2EQPTrainer(EndToEndTrainer):
    """`EndToEndTrainer` of some parameters of a packed model.

    Args:
        projector: where it is trained; None otherwise.
        **kwargs: as for `EndToEndTrainer`; `groups` from `trainable_groups`.
    """

    def __init__(self, *, projector: nn.Module | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.projector = projector

    def around_forward(self, model: nn.Module, inputs: Sample) -> AbstractContextManager[None]:
        """Let a batch without images reach a projector that is trained, too."""
        reached = "pixel_values" in inputs or self.blank is not None or model is not self.model
        if self.projector is None or reached:
            return super().around_forward(model, inputs)
        return adding_nothing(model, through(self.projector))


def run_e2e_qp(
    model: transformers.PreTrainedModel,
    data: Dataset[Sample],
    config: E2EQPConfig,
    arguments: transformers.TrainingArguments,
    *,
    teacher: nn.Module | None,
    projector: nn.Module | None = None,
    blank: Sample | None = None,
    collator: transformers.DataCollator | None = None,
    order: Order | None = None,
    watch: Watch | None = None,
    held_out: HeldOut | None = None,
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
        blank: as `EndToEndTrainer` takes it.
        collator: makes a batch of samples; None stacks them.
        order: of the samples, over all processes; None shuffles them.
        watch: who is told of the numbers, beside the console.
        held_out: samples to judge the model by.

    Returns:
        The Trainer's log, one record per line.

    Raises:
        ConfigError: a projector is to be trained and there is none.
        ConfigError: the last checkpoint is of another kind of run.
        TrainingError: the model or the data are not finite, or too many steps were not.
    """
    keep_freed_memory()
    recompute_where_it_pays(config.gradient_checkpointing, model, arguments)
    groups = trainable_groups(model, projector, config)
    trainer = E2EQPTrainer(
        model=model,
        args=arguments,
        groups=groups,
        train_dataset=data,
        data_collator=collator,
        teacher=teacher,
        order=order,
        projector=projector if "projector" in config.trained else None,
        blank=blank,
        precision=resolve(config.precision, arguments.device),
        stage="E2E-QP",
        watch=watch,
        held_out=held_out,
        keep_best=config.keep_best,
    )
    log = run_trainer(trainer)
    for module in model.modules():
        if isinstance(module, PackedLinear):
            module.round_scales()
    return log


def scale_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return the step sizes of every packed linear, as the modules name them."""
    return [p for module in model.modules() if isinstance(module, PackedLinear) for p in module.scale_parameters()]


def trainable_groups(model: nn.Module, projector: nn.Module | None, config: E2EQPConfig) -> list[dict[str, Any]]:
    """Return AdamW parameter groups of what is trained, and make exactly these parameters trainable.

    Raises:
        ConfigError: a projector is to be trained and there is none.
    """
    groups: list[dict[str, Any]] = []
    if "scales" in config.trained:
        groups.append({"params": scale_parameters(model), "weight_decay": 0.0})
    if "lora" in config.trained:
        rate = config.lora.learning_rate
        groups.append({"params": adapter_parameters(model), "lr": rate, "weight_decay": 0.0})
    if "projector" in config.trained:
        if projector is None:
            raise ConfigError(
                where="--trains",
                given=f"{config.trains}, of a model without a projector",
                allowed="scales or lora",
                do="train the step sizes, or choose a vision-language model",
            )
        rate = config.learning_rate if config.lr_projector is None else config.lr_projector
        groups.append({"params": list(projector.parameters()), "lr": rate, "weight_decay": 0.0})
    train_only(model, groups)
    return groups
