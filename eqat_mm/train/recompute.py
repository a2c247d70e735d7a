"""For which models activations are computed again in the backward instead of kept."""

from __future__ import annotations

from typing import Literal

import transformers
from torch import nn

from eqat_mm.quant.packed_linear import PackedLinear

FROM = 10**9
"""Weights from which on `auto` keeps no activations of the blocks."""


def recompute_where_it_pays(
    wanted: bool | Literal["auto"], model: nn.Module, arguments: transformers.TrainingArguments
) -> None:
    """Decide `gradient_checkpointing: auto`, now that there is a model."""
    if wanted == "auto":
        arguments.activation_checkpointing = arguments.device.type == "cuda" and weights_of(model) >= FROM


def weights_of(model: nn.Module) -> int:
    """Return how many weights a model has: packed ones and parameters, without step sizes."""
    packed = [module for module in model.modules() if isinstance(module, PackedLinear)]
    steps = {id(parameter) for linear in packed for parameter in linear.scale_parameters()}
    dense = sum(parameter.numel() for parameter in model.parameters() if id(parameter) not in steps)
    return dense + sum(linear.layout.in_features * linear.layout.out_features for linear in packed)
