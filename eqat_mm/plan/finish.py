"""What comes after training: judging the model, and the checkpoint itself."""

from __future__ import annotations

from eqat_mm.plan.amounts import Amount, Phase, amount, billions, size
from eqat_mm.plan.costs import attention_flop
from eqat_mm.plan.machine import Machine
from eqat_mm.plan.shape import ModelShape
from eqat_mm.plan.storage import checkpoint_bytes
from eqat_mm.quant.spec import QuantSpec

_HASH = 1.5e9
"""Bytes/s of SHA-256 on one core with the instructions for it."""


def plan_evaluation(shape: ModelShape, windows: int, length: int, batch: int, machine: Machine) -> Phase:
    """Return what it needs to compare a packed model with its full-precision model on text, one after the other."""
    width, tokens = (2 if machine.is_gpu else 4), windows * length
    logits = batch * length * shape.vocabulary
    outputs = tokens * shape.hidden * width
    device = amount(
        ("full-precision model", width * shape.parameters, f"{width} B x {billions(shape.parameters)}"),
        ("logits", 3 * width * logits, f"{3 * width} B x {billions(logits)}"),
    )
    host = amount(
        ("process", machine.process, "Python, torch, transformers"),
        ("reference outputs", outputs, f"{tokens} tokens x {shape.hidden} x {width} B"),
    )
    attention = attention_flop(shape, tokens, length) * len(shape.blocks)
    flop = 2 * (2 * (shape.passed + shape.vocabulary * shape.hidden) * tokens + attention)
    read = shape.parameters * shape.stored
    seconds = amount(
        ("products", flop / machine.product, f"2 models, {flop / 1e15:.1f} PFLOP"),
        ("reading", read / machine.drive, f"{size(read)} at {size(machine.drive)}/s"),
    )
    gpu, ram = (device, host) if machine.is_gpu else (Amount(), host + device)
    return Phase("evaluation", gpu, ram, Amount(), Amount(), seconds)


def plan_checkpoint(shape: ModelShape, spec: QuantSpec, machine: Machine) -> Phase:
    """Return what writing a packed checkpoint takes, or copying it to another format of the same bits."""
    number = checkpoint_bytes(shape, spec)
    stored = amount(("tensors", number, f"{spec.name}, {8 * number / shape.parameters:.2f} bits a parameter"))
    seconds = amount(
        ("writing", number / machine.drive, f"at {size(machine.drive)}/s"),
        ("SHA-256", number / _HASH, f"at {size(_HASH)}/s"),
    )
    largest = max(shape.embedding, shape.largest.weights)
    ram = amount(
        ("process", machine.process, "Python, torch, transformers"),
        ("largest shard", 2 * shape.stored * largest, "as read and as written"),
    )
    return Phase("checkpoint", Amount(), ram, stored, stored, seconds)
