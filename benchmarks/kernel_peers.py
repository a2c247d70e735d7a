"""What the kernels are compared with: torch's own int4 product, and the references under `torch.compile`.

    python benchmarks/time_kernels.py --cpu --only peers

`torch.compile` gets the formula as one expression, not the reference in slices: fusing it is the compiler's work.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import torch
from timing import interleaved
from torch import Tensor
from torch.nn.functional import linear

from eqat_kernels import PackedLayout, dequantize, fake_quantize, pack, quant_linear
from eqat_kernels.dequant import reference as dequant_reference

GROUP = 64
SHAPES = ((1536, 576), (4096, 4096))
"""(O, I): SmolLM2's largest linear, and one of Llama-7B."""

Timed = dict[str, Callable[[], object]]


class TorchInt4:
    """Torch's product with 4-bit weights, asymmetric, of codes of at most 4 bits (2 and 3 ride in 4).

    Its formula is (q - 8) s + b, so b = (8 - z) s; s and b have the dtype of the activations.

    Args:
        codes: uint8 [O, I].
        scale: s, float [O, G].
        zero: z, [O, G].
        dtype: of the activations.
    """

    def __init__(self, codes: Tensor, scale: Tensor, zero: Tensor, dtype: torch.dtype) -> None:
        self.size = codes.shape[1] // scale.shape[1]
        self.grid = torch.stack([scale.T, ((8 - zero) * scale).T], dim=-1).to(dtype).contiguous()
        if codes.is_cuda:
            pairs = (codes[:, ::2] << 4 | codes[:, 1::2]).contiguous()
            self.weight = torch.ops.aten._convert_weight_to_int4pack(pairs, 8)
            self.product: Any = torch.ops.aten._weight_int4pack_mm
        else:
            self.weight = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
            self.product = torch.ops.aten._weight_int4pack_mm_for_cpu

    def run(self, x: Tensor) -> Tensor:
        """Return [T, O] of x [T, I]."""
        y: Tensor = self.product(x, self.weight, self.size, self.grid)
        return y


class Layer:
    """A random packed layer, asymmetric, in groups of 64."""

    def __init__(self, outputs: int, inputs: int, bits: int, device: str = "cpu") -> None:
        groups, options = inputs // GROUP, {"dtype": torch.uint8, "device": device}
        self.layout = PackedLayout(bits, GROUP, outputs, inputs)
        self.codes = torch.randint(0, 1 << bits, (outputs, inputs), **options)
        self.scale = (torch.rand(outputs, groups, device=device) + 0.5) / 64
        self.zero = torch.randint(0, 1 << bits, (groups, outputs), **options).T
        self.words, self.zero_words = pack(self.codes, bits), pack(self.zero.T.contiguous(), bits).T.contiguous()
        self.stored = self.words, self.scale, self.zero_words, self.layout

    def int4(self, dtype: torch.dtype) -> TorchInt4:
        """Return the same layer for torch's product."""
        return TorchInt4(self.codes, self.scale, self.zero.float(), dtype)


def peers() -> None:
    """Print milliseconds of each op by each way of computing it, and the error of those that round otherwise."""
    print(f"\n{'op':<34}{'layer':>12}{'bits':>5}  milliseconds")
    for (outputs, inputs), bits in product(SHAPES, (2, 3, 4)):
        torch._dynamo.reset()  # it gives up after a few variants of a function
        layer = Layer(outputs, inputs, bits)
        name = f"{outputs}x{inputs}"
        for dtype in (torch.float32, torch.bfloat16):
            kind = str(dtype).removeprefix("torch.")
            _print(f"fake_quantize f+b, {kind}", name, bits, _fake_quantize(layer, dtype))
            _print(f"dequantize, {kind}", name, bits, _dequantize(layer, dtype))
            for rows in (1, 4, 16, 512):
                _print(f"quant_linear {rows} rows, {kind}", name, bits, _products(layer, rows, dtype))


def _print(op: str, layer: str, bits: int, timed: Timed) -> None:
    times = zip(timed, interleaved(list(timed.values()), 21), strict=True)
    print(f"{op:<34}{layer:>12}{bits:>5}  " + ", ".join(f"{name} {seconds * 1e3:.3f}" for name, seconds in times))


def _fake_quantize(layer: Layer, dtype: torch.dtype) -> Timed:
    bits, weight = layer.layout.bits, torch.randn(layer.codes.shape)
    scale, zero = layer.scale.clone(), layer.zero.float()
    grad = torch.randn(layer.codes.shape, dtype=dtype)
    compiled = torch.compile(_whole_fake_quantize, dynamic=False)

    def ours(impl: str) -> Callable[[], object]:
        leaves = [tensor.clone().requires_grad_() for tensor in (weight, scale, zero)]
        return lambda: torch.autograd.grad(fake_quantize(*leaves, bits, dtype=dtype, impl=impl), leaves, grad)  # type: ignore[misc]

    return {
        "C": ours("cpu"),
        "reference": ours("reference"),
        "compiled": lambda: compiled(weight, scale, zero, grad, bits),
    }


def _whole_fake_quantize(w_OI: Tensor, s_OG: Tensor, z_OG: Tensor, grad_OI: Tensor, bits: int) -> tuple[Tensor, ...]:
    """Forward and backward of `eqat_kernels.fake_quant.reference` without slices."""
    w_OGg, d_OGg = (tensor.unflatten(1, (s_OG.shape[1], -1)) for tensor in (w_OI, grad_OI.float()))
    s_OG1, z_OG1 = s_OG.unsqueeze(-1), z_OG.round().unsqueeze(-1)
    u_OGg = w_OGg / s_OG1
    v_OGg = u_OGg.round() + z_OG1
    q_OGg = v_OGg.clamp(0, (1 << bits) - 1)
    inside_OGg = v_OGg == q_OGg
    value = ((q_OGg - z_OG1) * s_OG1).flatten(1).to(grad_OI.dtype)
    grad_w = torch.where(inside_OGg, d_OGg, 0.0)
    grad_s = (d_OGg * (q_OGg - z_OG1 - torch.where(inside_OGg, u_OGg, 0.0))).sum(-1)
    return value, grad_w.flatten(1), grad_s, -s_OG * (d_OGg - grad_w).sum(-1)


def _dequantize(layer: Layer, dtype: torch.dtype) -> Timed:
    compiled = torch.compile(dequant_reference.dequantize, dynamic=False)
    return {
        "C": lambda: dequantize(*layer.stored, dtype, impl="cpu"),
        "reference": lambda: dequantize(*layer.stored, dtype, impl="reference"),
        "compiled": lambda: compiled(*layer.stored, dtype),
    }


@torch.no_grad()
def _products(layer: Layer, rows: int, dtype: torch.dtype) -> Timed:
    x = torch.randn(rows, layer.layout.in_features, dtype=dtype)
    dense = dequantize(*layer.stored, dtype)
    int4 = layer.int4(dtype)
    exact = linear(x.double(), dequantize(*layer.stored, torch.float64, impl="reference"))
    compiled = torch.compile(_dequantize_and_multiply, dynamic=False)

    def error(y: Tensor) -> str:
        return f"(error {(y.double() - exact).norm() / exact.norm():.0e})"

    timed: Timed = {
        "dense": lambda: linear(x, dense),
        f"C {error(quant_linear(x, *layer.stored, impl='cpu'))}": lambda: quant_linear(x, *layer.stored, impl="cpu"),
        "compiled": lambda: compiled(x, *layer.stored),
    }
    if rows <= 16 or dtype is torch.bfloat16:  # in float32 it takes seconds for many rows
        timed[f"torch int4 {error(int4.run(x))}"] = lambda: int4.run(x)
    return {name: torch.no_grad()(function) for name, function in timed.items()}


def _dequantize_and_multiply(
    x: Tensor, words: Tensor, scale: Tensor, zero_words: Tensor, layout: PackedLayout
) -> Tensor:
    return linear(x, dequant_reference.dequantize(words, scale, zero_words, layout, x.dtype))
