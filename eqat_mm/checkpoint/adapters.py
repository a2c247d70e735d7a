"""Low-rank adapters on the packed linears of a model, in `peft`'s own format, in the folder `adapter` of a checkpoint.

They are never merged: a merged weight would leave its grid. `peft` changes the model in place, so its class, its
modules' paths and its methods stay what they were.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from eqat_mm.checkpoint.manifest import ADAPTER
from eqat_mm.checkpoint.shards import save_shard
from eqat_mm.errors import CheckpointError, ConfigError
from eqat_mm.quant.packed_linear import PackedLinear
from eqat_mm.runtime.files import fsync
from eqat_mm.runtime.seeding import derive_seed

_WEIGHTS = "adapter_model.safetensors"
_CONFIG = "adapter_config.json"
_PREFIX = "base_model.model."  # in peft's files


def require_peft(where: str) -> Any:
    """Return the package `peft`.

    Raises:
        ConfigError: it is not.
    """
    if find_spec("peft") is None:
        raise ConfigError(
            where=where,
            given="peft is not installed",
            allowed="an environment with it",
            do="pip install 'eqat-mm[peft]'",
        )
    return import_module("peft")


def adapter_bits(folder: Path) -> int:
    """Return the bits that the adapters beside a checkpoint take; 0 where there are none."""
    path = folder / ADAPTER / _WEIGHTS
    return sum(tensor.nbytes for tensor in load_file(path).values()) * 8 if path.is_file() else 0


def has_adapters(model: nn.Module) -> bool:
    """Whether adapters are on the packed linears of `model`."""
    return hasattr(model, "peft_config")


def add_adapters(model: nn.Module, rank: int, alpha: int, seed: int) -> None:
    """Put a new adapter on every packed linear of `model`; it adds nothing before it is trained.

    Args:
        model: packed.
        rank: of the adapters.
        alpha: what they add is scaled by alpha / rank.
        seed: of the random factor A; B starts at zero.

    Raises:
        ConfigError: `peft` is not installed, or the model has adapters already.
    """
    peft = require_peft("adapters")
    if has_adapters(model):
        raise ConfigError(
            where="--quantized",
            given="a checkpoint that has adapters already",
            allowed="a packed checkpoint without adapters",
            do="start from the output of Block-AP",
        )
    targets = [path for path, module in model.named_modules() if isinstance(module, PackedLinear)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "adapters"))
        _inject(model, peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets))


def adapter_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return the factors A and B of every adapter, as the modules name them."""
    return [parameter for name, parameter in model.named_parameters() if ".lora_A." in name or ".lora_B." in name]


def without_adapters(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the state dict that a packed model has without its adapters, from the one that it has."""
    plain = {name.replace(".base_layer.", "."): tensor for name, tensor in state.items()}
    return {name: tensor for name, tensor in plain.items() if ".lora_A." not in name and ".lora_B." not in name}


def save_adapters(model: nn.Module, folder: Path) -> None:
    """Write the adapters of `model` in `peft`'s format."""
    peft = require_peft(str(folder))
    folder.mkdir()
    configs: Any = model.peft_config
    configs["default"].save_pretrained(folder)
    fsync(folder / _CONFIG)
    tensors = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    save_shard(folder / _WEIGHTS, {_PREFIX + name: tensor for name, tensor in tensors.items()})


def load_adapters(model: nn.Module, folder: Path) -> None:
    """Put the adapters in `folder` on the packed `model`.

    Raises:
        ConfigError: `peft` is not installed.
        CheckpointError: they are not adapters of this model.
    """
    peft = require_peft(str(folder))
    try:
        stored = {name.removeprefix(_PREFIX): tensor for name, tensor in load_file(folder / _WEIGHTS).items()}
        _inject(model, peft.LoraConfig.from_pretrained(str(folder)))
        given = peft.set_peft_model_state_dict(model, stored)
    except Exception as error:  # what peft makes of a broken file depends on its release
        raise _not_of_this_model(folder, f"{type(error).__name__}: {error}") from error
    missing = [name for name in given.missing_keys if ".lora_" in name]
    if given.unexpected_keys or missing:
        raise _not_of_this_model(folder, f"{len(given.unexpected_keys)} tensors too many, {len(missing)} too few")


def _not_of_this_model(folder: Path, given: str) -> CheckpointError:
    return CheckpointError(
        where=str(folder),
        given=" ".join(given.split())[:200],
        allowed="the adapters of this model",
        do="copy or make the checkpoint again",
    )


def _inject(model: nn.Module, config: Any) -> None:
    teach_peft()
    require_peft("adapters").inject_adapter_in_model(config, model)


@cache
def teach_peft() -> None:
    """Let `peft` put adapters on packed linears, also where a user calls `get_peft_model`; nothing where it is missing.

    `peft` asks its dispatchers in turn what fits a module, and has no list to which one could be added.
    """
    if find_spec("peft") is None:
        return
    from eqat_mm.quant.packed_lora import PackedLoRA

    tuner: Any = import_module("peft.tuners.lora.model")
    others = tuner.dispatch_default

    def dispatch(target: nn.Module, adapter_name: str, config: Any, **options: Any) -> nn.Module | None:
        base = getattr(target, "base_layer", target)
        if isinstance(base, PackedLinear):
            return PackedLoRA(base, adapter_name, config=config, **options)
        found: nn.Module | None = others(target, adapter_name, config=config, **options)
        return found

    tuner.dispatch_default = dispatch
