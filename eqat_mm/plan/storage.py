"""Bytes of a packed model, in memory and on disk."""

from __future__ import annotations

from functools import lru_cache

import torch

from eqat_mm.plan.shape import BlockShape, ModelShape
from eqat_mm.quant.packed_linear import PackedLinear
from eqat_mm.quant.spec import QuantSpec


@lru_cache(maxsize=256)
def linear_bytes(rows: int, columns: int, spec: QuantSpec) -> tuple[int, int]:
    """Return (bytes of codes, zero points and shape; number of step sizes) of a packed linear.

    They are read off a `PackedLinear` without storage, so that its layout is written down once.

    Raises:
        ConfigError: the group size does not divide the inputs.
    """
    with torch.device("meta"):
        module = PackedLinear(columns, rows, spec)
    scales = module.weight_scale.numel()
    return sum(buffer.nbytes for buffer in module.buffers()), scales


def block_codes(block: BlockShape, spec: QuantSpec) -> int:
    """Bytes of codes and zero points in a block."""
    return sum(linear_bytes(*size, spec.of(name))[0] for name, size in zip(block.names, block.linears, strict=True))


def block_scales(block: BlockShape, spec: QuantSpec) -> int:
    """Number of step sizes in a block; there are as many zero points."""
    return sum(linear_bytes(*size, spec.of(name))[1] for name, size in zip(block.names, block.linears, strict=True))


def codes(shape: ModelShape, spec: QuantSpec) -> int:
    """Bytes of codes and zero points in the model."""
    return sum(block_codes(block, spec) for block in shape.blocks)


def scales(shape: ModelShape, spec: QuantSpec) -> int:
    """Number of step sizes in the model."""
    return sum(block_scales(block, spec) for block in shape.blocks)


def average_bits(shape: ModelShape, spec: QuantSpec) -> float:
    """Stored bits per quantized weight, with step sizes and zero points; words are not filled up."""
    return (
        sum(
            rows * columns * spec.of(name).bits_per_weight(columns)
            for block in shape.blocks
            for name, (rows, columns) in zip(block.names, block.linears, strict=True)
        )
        / shape.weights
    )


def checkpoint_bytes(shape: ModelShape, spec: QuantSpec) -> int:
    """Bytes of all tensors in a packed checkpoint; the headers of its files come on top (some kB a block)."""
    step_sizes = scales(shape, spec) * spec.storage_dtype.itemsize
    return codes(shape, spec) + step_sizes + shape.unquantized * shape.stored
