"""The linear layer that is stored and served: packed codes, trainable step sizes.

Its tensors have the names and layouts of compressed-tensors' `pack-quantized` format, so the state dict of a
packed model is its checkpoint.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from eqat_kernels import PackedLayout, pack, quant_linear
from eqat_kernels import dequantize as dequantize_packed
from eqat_mm.quant.grid import as_stored
from eqat_mm.quant.spec import QuantSpec


class PackedLinear(nn.Module):
    """Linear layer on packed integer weights.

    Tensors (O outputs, I inputs, G groups, N bits):
        weight_packed: buffer, int32 [O, ceil(I*N/32)].
        weight_zero_point: buffer, int32 [ceil(O*N/32), G]; absent on the symmetric grid.
        weight_shape: buffer, int64 [2], (O, I).
        weight_scale: parameter, float32 [O, G]: master copy; stored as `spec.scale_dtype`.
        bias: buffer, [O], or None.

    A new module holds zeros; fill it with `from_codes`, or `load_state_dict`.
    """

    weight_packed: Tensor
    weight_zero_point: Tensor | None
    weight_shape: Tensor
    bias: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        spec: QuantSpec,
        *,
        bias: bool = False,
        layer: str = "layer",
    ) -> None:
        super().__init__()
        group = spec.group_of(in_features, layer)
        self.spec = spec
        self.layout = PackedLayout(spec.bits, group, out_features, in_features)
        groups, words = self.layout.groups, -(-in_features * spec.bits // 32)
        zero_words = (
            None if spec.symmetric else torch.zeros(-(-out_features * spec.bits // 32), groups, dtype=torch.int32)
        )
        self.register_buffer("weight_packed", torch.zeros(out_features, words, dtype=torch.int32))
        self.register_buffer("weight_zero_point", zero_words)
        self.register_buffer("weight_shape", torch.tensor([out_features, in_features]))
        self.weight_scale = nn.Parameter(torch.zeros(out_features, groups, dtype=torch.float32))
        self.register_buffer("bias", torch.zeros(out_features, dtype=torch.float32) if bias else None)

    @classmethod
    @torch.no_grad()
    def from_codes(
        cls, codes: Tensor, scale: Tensor, zero_point: Tensor, bias: Tensor | None, spec: QuantSpec, **options: Any
    ) -> PackedLinear:
        """Pack codes uint8 [O, I] with step sizes and zero points float [O, G].

        Step sizes are rounded as they are stored: what is computed with is what is stored. `options` are those of the
        class.
        """
        out_features, in_features = codes.shape
        packed = cls(in_features, out_features, spec, bias=bias is not None, **options).to(codes.device)
        packed.weight_packed = pack(codes, spec.bits)
        packed.weight_scale.copy_(as_stored(scale, spec))
        if packed.weight_zero_point is not None:
            packed.weight_zero_point = pack(zero_point.round().to(torch.uint8).T.contiguous(), spec.bits).T.contiguous()
        packed.bias = bias
        return packed

    def forward(self, x: Tensor) -> Tensor:
        """Return x @ W_hat.T + bias, [..., I] -> [..., O]."""
        # torch finds an attribute of a module in 1 us, an entry of its dictionaries in a tenth: it counts at one token.
        held: dict[str, Any] = self._buffers
        scale: Any = self._parameters["weight_scale"]
        return quant_linear(x, held["weight_packed"], scale, held["weight_zero_point"], self.layout, self.bias)

    @property
    def weight(self) -> Tensor:
        """The dense weight W_hat, [O, I], float32, made anew: for models that read a linear instead of calling it.

        Gradients reach the step sizes.
        """
        ones = torch.ones_like(self.weight_scale)
        levels = dequantize_packed(self.weight_packed, ones, self.weight_zero_point, self.layout, torch.float32)
        return levels * self.weight_scale.repeat_interleave(self.layout.group_size, 1)

    def scale_parameters(self) -> list[nn.Parameter]:
        """Step sizes s, the only trainable tensor."""
        return [self.weight_scale]

    @torch.no_grad()
    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the dense weight W_hat, [O, I]."""
        return dequantize_packed(self.weight_packed, self.weight_scale, self.weight_zero_point, self.layout, dtype)

    @torch.no_grad()
    def round_scales(self) -> None:
        """Round the step sizes as they are stored; call at the end of training, before evaluation."""
        self.weight_scale.copy_(as_stored(self.weight_scale, self.spec))

    def extra_repr(self) -> str:
        """Shape and spec."""
        return f"{self.layout.in_features}, {self.layout.out_features}, {self.spec.name}"
