"""What an end-to-end trainer and DeepSpeed must agree on: the precision, the device, who holds which part of what."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.training_args import ParallelMode

from eqat_mm.runtime.precision import Decided
from eqat_mm.runtime.progress import say


def autocast_settings(precision: Decided) -> dict[str, Any]:
    """Return the part of DeepSpeed's configuration that lets an engine make matrix products in `precision`.

    An engine whose configuration does not ask for it switches off, on a GPU, the autocast around it. No module is
    named whose gradients would be summed in 16 bits: what is trained is float32 all the way.
    """
    on = {"enabled": precision == "bfloat16", "dtype": "bfloat16", "lower_precision_safe_modules": []}
    return {"torch_autocast": on}


def keep_precision(arguments: transformers.TrainingArguments, precision: Decided) -> None:
    """Let DeepSpeed, where it is used, compute in `precision`, whatever its file says."""
    if arguments.deepspeed_plugin is not None:
        arguments.deepspeed_plugin.deepspeed_config.update(autocast_settings(precision))


def use_one_device(arguments: transformers.TrainingArguments, device: torch.device) -> None:
    """Let a process that no launcher started train on `device` alone.

    transformers would take `cuda:0` whatever was asked for, and put the model on every GPU that it sees, as
    `nn.DataParallel`, which cuts a batch where it cannot be cut.
    """
    if device.type != "cuda" or arguments.parallel_mode is ParallelMode.DISTRIBUTED:
        return
    device = torch.device("cuda", device.index or 0)
    arguments._n_gpu = 1
    arguments.__dict__["_setup_devices"] = device  # what `arguments.device` keeps once it has decided
    torch.cuda.set_device(device)  # accelerate moves the model to the current one


def placed(teacher: nn.Module, arguments: transformers.TrainingArguments, precision: Decided) -> nn.Module:
    """Return the teacher where a process needs it: on its device, or under ZeRO-3 its part of it."""
    if not divides_parameters(arguments):
        return teacher.to(arguments.device)
    import deepspeed

    plugin: Any = arguments.deepspeed_plugin
    # as the student is divided; what the Trainer decides ("auto") is about training, which the teacher is not
    division = {name: v for name, v in plugin.deepspeed_config["zero_optimization"].items() if v != "auto"}
    config = {"zero_optimization": division, "train_micro_batch_size_per_gpu": 1} | autocast_settings(precision)
    engine, *_ = deepspeed.initialize(model=teacher, config=config)
    if arguments.process_index == 0:
        say(f"the teacher is divided among {arguments.world_size} processes")
    return engine  # type: ignore[no-any-return]


def divides_parameters(arguments: transformers.TrainingArguments) -> bool:
    """Whether each process has but a part of every parameter: ZeRO-3."""
    plugin = arguments.deepspeed_plugin
    return plugin is not None and plugin.zero_stage == 3


def shape_of(parameter: nn.Parameter) -> list[int]:
    """Return the shape of a whole parameter, of which ZeRO-3 may leave a part here."""
    return list(getattr(parameter, "ds_shape", parameter.shape))


def here(value: Tensor) -> Tensor:
    """Return what this process has of a tensor, of which ZeRO-3 may have left a part."""
    part: Tensor = getattr(value, "ds_tensor", value)
    return part


@torch.no_grad()
def whole(parameter: nn.Parameter) -> Tensor:
    """Return the whole of a parameter, of which ZeRO-3 may leave a part here; all processes ask at once."""
    if not hasattr(parameter, "ds_id"):
        return parameter.detach()
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter]):
        return parameter.detach().clone()


def make_whole(model: nn.Module) -> None:
    """Give every process the whole parameters, which ZeRO-3 leaves in parts."""
    for parameter in model.parameters():
        if hasattr(parameter, "ds_id"):
            parameter.data = whole(parameter)
