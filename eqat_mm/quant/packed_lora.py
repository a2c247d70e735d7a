"""A packed linear with low-rank adapters beside it, as `peft` wants one for a module it does not know.

Importing this module imports `peft`, which is an optional package.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from torch import Tensor, nn

from eqat_mm.quant.packed_linear import PackedLinear

LoraLayer: Any = import_module("peft.tuners.lora").LoraLayer  # typed alike whether peft is installed or not


class PackedLoRA(nn.Module, LoraLayer):  # type: ignore[misc]
    """x @ W_hat.T + bias + alpha/r * B(A(x)): the packed weight stays on its grid and is never merged.

    Tensors beside those of `base_layer` (rank r): `lora_A.NAME.weight` [r, I], `lora_B.NAME.weight` [O, r].

    Args:
        base_layer: the packed linear.
        adapter_name: of the first adapter.
        config: of the adapter.
        r: its rank.
        lora_alpha: its scale, times the rank.
        **_: what `peft` passes for other kinds of layers.
    """

    base_layer: PackedLinear
    lora_A: Any
    lora_B: Any
    lora_dropout: Any
    scaling: dict[str, float]
    active_adapters: list[str]
    disable_adapters: bool

    def __init__(
        self, base_layer: PackedLinear, adapter_name: str, config: Any, r: int, lora_alpha: int, **_: Any
    ) -> None:
        super().__init__()
        LoraLayer.__init__(self, base_layer)
        self._active_adapter = adapter_name
        LoraLayer.update_layer(self, adapter_name, r, lora_alpha=lora_alpha, config=config)

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        assert isinstance(module, PackedLinear)
        return module.layout.in_features, module.layout.out_features

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: Any = None) -> None:
        # The base class looks for a weight; it would also cast adapters to the dtype of what it finds.
        device = self.base_layer.weight_scale.device if device is None else device
        nn.Module.to(self.lora_A[adapter_name], device)
        nn.Module.to(self.lora_B[adapter_name], device)

    def forward(self, x: Tensor) -> Tensor:
        """Return the packed linear's output with what the active adapters add, [..., I] -> [..., O]."""
        result: Tensor = self.base_layer(x)
        if self.disable_adapters:
            return result
        for name in self.active_adapters:
            given = self.lora_dropout[name](x.to(self.lora_A[name].weight.dtype))
            result = result + (self.lora_B[name](self.lora_A[name](given)) * self.scaling[name]).to(result.dtype)
        return result
