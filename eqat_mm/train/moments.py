"""What the optimizer knows of each trained parameter: whole, and by its name, however many processes hold it.

ZeRO leaves each process a part of one flat tensor. Gathered before they are saved and scattered when they are loaded,
the moments of AdamW fit any number of processes and any stage of ZeRO, or none.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

STEP = "step"
MOMENTS = ("exp_avg", "exp_avg_sq")
KEYS = (STEP, *MOMENTS)
"""What AdamW keeps of a parameter."""

_OF_STAGE_3 = "fp32_partitioned_groups_flat"


class Moments:
    """The state of an optimizer over named parameters.

    Args:
        trained: parameters by name.
        optimizer: torch's AdamW, or that of a DeepSpeed engine, which holds one.
    """

    def __init__(self, trained: Mapping[str, nn.Parameter], optimizer: Any) -> None:
        self.trained = trained
        self.optimizer = optimizer
        self.divided = hasattr(optimizer, "optimizer")

    def whole(self, key: str) -> dict[str, Tensor]:
        """Return one of `KEYS` of every parameter that has been stepped; all processes ask at once."""
        if not self.divided:
            states = {name: self.optimizer.state.get(value, {}) for name, value in self.trained.items()}
            return {name: state[key] for name, state in states.items() if state}
        states = self.optimizer.optimizer.state
        if not states:
            return {}
        if key == STEP:
            taken = float(next(iter(states.values()))[STEP])
            return {name: torch.tensor(taken) for name in self.trained}
        from deepspeed.utils import safe_get_full_optimizer_state

        self._link()
        return {name: safe_get_full_optimizer_state(value, key) for name, value in self.trained.items()}

    @torch.no_grad()
    def take(self, saved: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Give the optimizer what `whole` has returned.

        Args:
            saved: for each of `KEYS`, tensors by name.
        """
        if not saved[STEP]:
            return
        if self.divided:
            self._begin(max(value.item() for value in saved[STEP].values()))
            for key in MOMENTS:
                for name, value in saved[key].items():
                    _scatter(self.trained[name], key, value)
            return
        for name in saved[STEP]:
            parameter = self.trained[name]
            self.optimizer.state[parameter] = {key: saved[key][name].to(parameter.device, copy=True) for key in KEYS}

    def _begin(self, step: float) -> None:
        """Make the state that the first step would make: what is flat in this process has moments of zero."""
        zero = self.optimizer
        for flat in getattr(zero, _OF_STAGE_3, None) or zero.single_partition_of_fp32_groups:
            moments = {key: torch.zeros_like(flat) for key in MOMENTS}
            zero.optimizer.state[flat] = {STEP: torch.tensor(step, device=flat.device), **moments}
        self._link()

    def _link(self) -> None:
        """Let parameters know their moments; DeepSpeed does so after the first step of the first group, for all."""
        from deepspeed.utils import lazy_init_hp_params_optimizer_state

        zero = self.optimizer
        if not hasattr(zero, _OF_STAGE_3):
            for group, flat in zip(zero.bit16_groups, zero.single_partition_of_fp32_groups, strict=True):
                lazy_init_hp_params_optimizer_state(group, flat, zero.optimizer.state)


def _scatter(parameter: Any, key: str, value: Tensor) -> None:
    """Put this process's part of a whole moment where it belongs."""
    from deepspeed import comm
    from deepspeed.utils import (
        safe_get_local_optimizer_state,
        safe_set_full_optimizer_state,
        safe_set_local_optimizer_state,
    )

    if not hasattr(parameter, "ds_id"):
        safe_set_full_optimizer_state(parameter, value, key)
        return
    size = safe_get_local_optimizer_state(parameter, key).numel()
    start = size * comm.get_rank(parameter.ds_process_group)
    part = value.flatten()[start : start + size]
    safe_set_local_optimizer_state(parameter, functional.pad(part, (0, size - part.numel())), key)
