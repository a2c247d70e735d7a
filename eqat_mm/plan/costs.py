"""The constants in the formulas: what an implementation keeps, moves and reaches. docs/planning.md says where from."""

from __future__ import annotations

from dataclasses import dataclass, replace

from eqat_mm.plan.machine import Machine
from eqat_mm.plan.shape import BlockShape, ModelShape


@dataclass(frozen=True)
class Costs:
    """Constants of an implementation of the method.

    Attributes:
        fitted: Block-AP, bytes in memory per number that is trained in a block, at the worst moment of training.
        fitted_traffic: Block-AP, bytes moved per trained number and step: fake quantization, clipping, AdamW.
        touched: Block-AP, bytes moved per token and channel of block and MLP, outside of products.
        host: Block-AP, seconds a step in which the device waits for Python.
        step_size: E2E-QP, bytes in memory per step size: itself, AdamW.
        step_gradient: E2E-QP, bytes of the gradient of a step size.
        logit: E2E-QP, bytes per logit when the loss is computed.
        scratch: E2E-QP, bytes per weight of the largest linear: dequantized, and its gradient.
        packed_rate: E2E-QP, share of a dense product's rate for the products with a packed weight.
        scale_rate: E2E-QP, share of it for the gradient of the step sizes.
        touched_end_to_end: E2E-QP, as `touched`.
        touched_logit: bytes moved per logit for the loss and its gradient.
    """

    fitted: float
    fitted_traffic: float
    touched: float
    host: float
    step_size: float
    step_gradient: float
    logit: float
    scratch: float
    packed_rate: float
    scale_rate: float
    touched_end_to_end: float
    touched_logit: float = 20


OURS = Costs(
    fitted=20,  # W 4, gradient 4, AdamW 8, best so far 4
    fitted_traffic=92,  # measured, H200: clipping, AdamW, bounds 3.4 ms, 68 bytes; fake quantization 24
    touched=430,  # measured, H200: what is left of a step of 17.7 ms
    host=0.0,
    step_size=12,  # float32: itself, AdamW 8
    step_gradient=4,
    logit=6,  # bfloat16: logits, their gradient, and the same scaled
    scratch=6,  # bfloat16 weight, float32 gradient
    packed_rate=650 / 815,
    scale_rate=373 / 785,
    touched_end_to_end=150,  # measured, H200: what is left of a step
)
"""This package on a GPU."""

ON_CPU = replace(OURS, touched=700, touched_end_to_end=700, touched_logit=40)
"""This package on a CPU, where streams are float32 and operators read and write more; from runs of a small model."""

ORIGINAL = Costs(
    fitted=30,  # fp32 W, gradient, AdamW; its chain of operators keeps W / s, the code, W_hat and a 16-bit copy
    fitted_traffic=229,  # with `host` from the published hours of 7B and 70B
    touched=430,
    host=0.015,
    step_size=6,  # all in 16 bits: the published memory at 2, 3 and 4 bits leaves no more
    step_gradient=2,
    logit=14,
    scratch=2,
    packed_rate=0.81,  # from the published hours of 7B
    scale_rate=0.81,
    touched_end_to_end=150,
)
"""The published implementation, as far as its published memory and hours tell; for comparison."""


def costs_on(machine: Machine) -> Costs:
    """Return the constants of this package on a machine."""
    return OURS if machine.is_gpu else ON_CPU


_KEPT = {"float32": (24, 16), "autocast": (38, 8), "bfloat16": (32, 8)}
"""Bytes kept for the backward per token: (per channel of the residual stream, per channel of the MLP), by what norms,
attention and MLP of a Llama block keep in these precisions."""


def kept(block: BlockShape, shape: ModelShape, precision: str) -> int:
    """Bytes per token that a block keeps for its backward; `autocast` is a float32 stream with bfloat16 products."""
    hidden, inner = _KEPT[precision]
    return hidden * shape.hidden + inner * block.inner


def in_flight(block: BlockShape, shape: ModelShape, width: int) -> int:
    """Bytes per token of gradients that live at once in a block's backward, `width` bytes each."""
    return width * (2 * shape.hidden + 3 * block.inner)


def attention_flop(shape: ModelShape, tokens: float, length: int) -> float:
    """FLOP of one forward through the causal attention of one block."""
    return 2.0 * tokens * length * shape.queries


def channels(block: BlockShape, shape: ModelShape) -> int:
    """Channels of block and MLP, by which `touched` counts."""
    return shape.hidden + block.inner
