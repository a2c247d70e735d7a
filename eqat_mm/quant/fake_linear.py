"""The linear layer that is trained: full-precision weight, seen by the network through its grid."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from eqat_kernels import fake_quant_linear
from eqat_mm.quant.grid import away_from_zero
from eqat_mm.quant.spec import QuantSpec


class FakeQuantLinear(nn.Module):
    """`nn.Linear` whose weight is quantized and dequantized in every forward.

    All of W, s and z are trainable (z only on the asymmetric grid). They are kept in the dtype given, normally
    float32; the bias, where there is one, stays as it was and is not trained.

    Args:
        weight: W, float [O, I].
        bias: [O] or None.
        scale: initial s, float [O, G].
        zero_point: initial z, float [O, G].
        spec: bits and symmetry.
    """

    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None, scale: Tensor, zero_point: Tensor, spec: QuantSpec) -> None:
        super().__init__()
        self.spec = spec
        self.weight = nn.Parameter(weight)
        self.scale = nn.Parameter(scale)
        self.zero_point = nn.Parameter(zero_point, requires_grad=not spec.symmetric)
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return x @ W_hat.T + bias, [..., I] -> [..., O]."""
        return fake_quant_linear(x, self.weight, self.scale, self.zero_point, self.spec.bits, self.bias)

    def weight_parameters(self) -> list[nn.Parameter]:
        """W."""
        return [self.weight]

    def scale_parameters(self) -> list[nn.Parameter]:
        """Step sizes s."""
        return [self.scale]

    def zero_point_parameters(self) -> list[nn.Parameter]:
        """Zero points z; empty on the symmetric grid."""
        return [] if self.spec.symmetric else [self.zero_point]

    def extra_repr(self) -> str:
        """Shape and spec."""
        out_features, in_features = self.weight.shape
        return f"{in_features}, {out_features}, {self.spec.name}"


def fake_quant_linears(block: nn.Module) -> list[FakeQuantLinear]:
    """Return all of them in a block, in the order of its modules."""
    return [module for module in block.modules() if isinstance(module, FakeQuantLinear)]


@torch.no_grad()
def project(linears: Iterable[FakeQuantLinear]) -> None:
    """Bring s and z back to what can be stored: s away from zero, z in [0, 2^N - 1]. Call after an optimizer step."""
    for linear in linears:
        away_from_zero(linear.scale, signed=linear.spec.symmetric, out=linear.scale)
        linear.zero_point.clamp_(0, linear.spec.top)
