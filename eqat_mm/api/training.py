"""A packed model under a Trainer of one's own: which parameters it trains, and how they end."""

from __future__ import annotations

from typing import Any

import transformers
from torch import nn
from transformers import PreTrainedModel, TrainerCallback

from eqat_mm.api.in_memory import is_packed_model
from eqat_mm.errors import ConfigError
from eqat_mm.quant.packed_linear import PackedLinear
from eqat_mm.train.e2e_qp import E2EQPConfig, Trained, trainable_groups
from llava_adapters import arch_for


def train_only(model: PreTrainedModel, trains: Trained = "scales") -> list[nn.Parameter]:
    """Make exactly these parameters of a packed model trainable, in float32; return them.

    `transformers.Trainer` then trains them and nothing else.

    Args:
        model: as `load`, `quantize` and `tune` return it; changed.
        trains: `scales` (step sizes, float32 [outputs, groups]), `projector` (of a vision-language model), `lora`
            (adapters that are on the model), or one of these with the projector: `scales+projector`.

    Raises:
        ConfigError: not a packed model, no such part, or a model without it.
    """
    if not is_packed_model(model):
        raise ConfigError("model", f"a {type(model).__name__}", "a model as `eqat_mm.load` returns it", "load one")
    origin: Any = model.checkpoint_origin
    arch = arch_for(origin.manifest.arch, "the model: the adapter that made it")
    groups = trainable_groups(model, arch.find_projector(model), E2EQPConfig(trains=trains))
    found: list[nn.Parameter] = [parameter for group in groups for parameter in group["params"]]
    if not found:
        raise ConfigError("trains", f"{trains}, of which the model has nothing", "scales, or projector", "choose one")
    return found


class RoundStepSizes(TrainerCallback):
    """Rounds step sizes as they are stored when training ends, so that what is judged is what is saved.

    `Trainer(..., callbacks=[RoundStepSizes()])`. In training they are float32, in a checkpoint 16 bits.
    """

    def on_train_end(
        self,
        args: transformers.TrainingArguments,
        state: transformers.TrainerState,
        control: transformers.TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Round."""
        for module in () if model is None else model.modules():
            if isinstance(module, PackedLinear):
                module.round_scales()
