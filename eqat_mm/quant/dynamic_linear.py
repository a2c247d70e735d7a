"""The two linears of LLM-QAT: both quantize their input, token by token, on the range that it has.

`DynamicFakeLinear` is trained; its weight is on the min-max grid of the moment. `DynamicPackedLinear` is stored and
served: a packed linear whose input is quantized.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from eqat_mm.quant.activations import fake_quantize_symmetric, quantize_symmetric
from eqat_mm.quant.packed_linear import PackedLinear
from eqat_mm.quant.spec import QuantSpec


class DynamicFakeLinear(nn.Module):
    """`nn.Linear` whose weight and input are quantized and dequantized in every forward.

    The weight and the bias are trainable. There is no step size among the parameters: it follows from the weight.

    Args:
        weight: W, float [O, I]; a parameter is held as it is, not copied.
        bias: [O] or None; likewise.
        spec: of the weight; symmetric.
        activation_bits: of the input; 16 leaves it as it is.
        layer: name for messages.

    Raises:
        ConfigError: the group size does not divide I.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        spec: QuantSpec,
        activation_bits: int,
        *,
        layer: str = "layer",
    ) -> None:
        super().__init__()
        assert spec.symmetric, spec.name
        self.spec, self.activation_bits = spec, activation_bits
        self.group = spec.group_of(weight.shape[1], layer)
        self.weight = _parameter(weight)
        self.bias = None if bias is None else _parameter(bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return x_q @ W_q.T + bias, [..., I] -> [..., O]."""
        w_OGg = self.weight.unflatten(1, (-1, self.group))
        weight = fake_quantize_symmetric(w_OGg, self.spec.bits, self.spec.storage_dtype).flatten(1)
        return nn.functional.linear(fake_quantize_symmetric(x, self.activation_bits), weight, self.bias)

    def weight_parameters(self) -> list[nn.Parameter]:
        """W, and the bias where there is one."""
        return [self.weight] if self.bias is None else [self.weight, self.bias]

    @torch.no_grad()
    def codes(self) -> tuple[Tensor, Tensor]:
        """Return the codes of the weight as they are stored, uint8 [O, I], and step sizes, float [O, G]."""
        w_OGg = self.weight.unflatten(1, (-1, self.group))
        codes_OGg, scale_OG1 = quantize_symmetric(w_OGg, self.spec.bits, self.spec.storage_dtype)
        return (codes_OGg.flatten(1) + self.spec.middle).to(torch.uint8), scale_OG1.squeeze(-1)

    def extra_repr(self) -> str:
        """Shape, spec and bits of the input."""
        out_features, in_features = self.weight.shape
        return f"{in_features}, {out_features}, {self.spec.name}a{self.activation_bits}"


def _parameter(tensor: Tensor) -> nn.Parameter:
    return tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor)


class DynamicPackedLinear(PackedLinear):
    """`PackedLinear` whose input is quantized per token; the tensors are the same.

    Args:
        in_features: I.
        out_features: O.
        spec: of the weight.
        activation_bits: of the input.
        **options: as of `PackedLinear`.
    """

    def __init__(
        self, in_features: int, out_features: int, spec: QuantSpec, *, activation_bits: int = 8, **options: Any
    ) -> None:
        super().__init__(in_features, out_features, spec, **options)
        self.activation_bits = activation_bits

    def forward(self, x: Tensor) -> Tensor:
        """Return x_q @ W_hat.T + bias, [..., I] -> [..., O]."""
        return super().forward(fake_quantize_symmetric(x, self.activation_bits))

    def extra_repr(self) -> str:
        """Shape, spec and bits of the input."""
        return f"{super().extra_repr()}a{self.activation_bits}"
