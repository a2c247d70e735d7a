"""On which device each part of a model lies, where it is on several."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from accelerate import dispatch_model
from accelerate.utils import check_device_map, get_balanced_memory, infer_auto_device_map
from torch import nn

from eqat_mm.errors import ConfigError

DeviceMap = str | Mapping[str, str | int | torch.device]
"""`auto`, a device, or path of a module -> device, as transformers takes it."""

_AUTO = ("auto", "balanced", "balanced_low_0", "sequential")


def main_device(device: str | torch.device, wanted: DeviceMap | None) -> torch.device:
    """Return the device that a model is mostly on: it decides dtype and kernels.

    Raises:
        ConfigError: a device that is none, or is not there.
    """
    if wanted is None:
        return torch.device(device)
    if isinstance(wanted, str) and wanted in _AUTO:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = [_device(each) for each in ([wanted] if isinstance(wanted, str) else wanted.values())]
    return next((each for each in found if each.type != "cpu"), torch.device("cpu"))


def _device(named: str | int | torch.device) -> torch.device:
    try:
        found = torch.device(named)
        there = found.type != "cuda" or (found.index or 0) < torch.cuda.device_count()
    except RuntimeError:
        there = False
    if not there or found.type in ("meta", "disk"):
        raise _refused(str(named), "no device of this machine that could compute")
    return found


class Devices:
    """Where each tensor of a model goes.

    Args:
        model: packed, on the meta device.
        wanted: devices of its parts.
        dtype: of what is not quantized; decides how much fits.

    Raises:
        ConfigError: a part without a device, or a device that is none, is not there, or is full.
    """

    def __init__(self, model: nn.Module, wanted: DeviceMap, dtype: torch.dtype) -> None:
        self.places: dict[str, Any] = _places(model, wanted, dtype)
        try:
            check_device_map(model, self.places)
        except ValueError as error:
            raise _refused(f"{wanted!r}"[:80], " ".join(str(error).split())[:200]) from error
        self._devices = {path: _device(device) for path, device in self.places.items()}

    def of(self, name: str) -> torch.device:
        """Return the device of a tensor."""
        path = max((each for each in self.places if not each or f"{name}.".startswith(f"{each}.")), key=len)
        return self._devices[path]

    def spread(self, model: nn.Module) -> None:
        """Put what is computed, not stored, on the devices as well; of several, inputs follow the parts."""
        if len(set(self._devices.values())) == 1:
            nn.Module.to(model, next(iter(self._devices.values())))
        else:
            dispatch_model(model, self.places, offload_buffers=True)


def _places(model: nn.Module, wanted: DeviceMap, dtype: torch.dtype) -> dict[str, Any]:
    if not isinstance(wanted, str):
        places: dict[str, Any] = dict(wanted)
    elif wanted not in _AUTO:
        places = {"": wanted}
    else:
        whole = getattr(model, "_no_split_modules", None) or []
        room = None
        if wanted != "sequential":
            low = wanted == "balanced_low_0"
            room = get_balanced_memory(model, dtype=dtype, no_split_module_classes=list(whole), low_zero=low)
        places = dict(infer_auto_device_map(model, room, list(whole), dtype=dtype))
    return places


def _refused(given: str, why: str) -> ConfigError:
    allowed = "auto, a device, or a device for every part of the model"
    return ConfigError("device_map", f"{given} ({why})", allowed, "name devices with room for the model")
