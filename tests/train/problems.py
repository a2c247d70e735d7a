"""Blocks of the tiny model, ready to be fitted; what models give, and whether they are the same."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from eqat_mm.blocks.arch import Inputs, set_submodule
from eqat_mm.blocks.source import open_model
from eqat_mm.blocks.walker import BlockStep, BlockWalker, capture_front
from eqat_mm.checkpoint.folders import load_tokenizer
from eqat_mm.data.text.windows import text_windows
from eqat_mm.quant.convert import to_fake
from eqat_mm.quant.init import initial_grid
from eqat_mm.quant.spec import QuantSpec
from eqat_mm.train.block_ap import BlockAPConfig, quantize_block
from eqat_mm.train.fit import FitConfig
from eqat_mm.train.losses import block_loss, cross_entropy, kl_divergence, predictions_that_count
from llava_adapters.llama import ARCH
from tests.tiny_model import Tiny

CPU = torch.device("cpu")
SPEC = QuantSpec(bits=2, group_size=32)
SAMPLES = 12
LENGTH = 16


def batches_of(tiny: Tiny, count: int = SAMPLES) -> list[Inputs]:
    """Calibration samples [1, 16]."""
    windows = text_windows(load_tokenizer(tiny.folder), tiny.windows(count, length=LENGTH))
    return [{"input_ids": window.unsqueeze(0)} for window in windows]


def walker_of(tiny: Tiny, device: torch.device = CPU) -> BlockWalker:
    """Both streams at the input of block 0."""
    opened = open_model(tiny.folder, ARCH)
    return BlockWalker(opened, capture_front(opened, batches_of(tiny), torch.float32), device=device, batch_tokens=64)


def step_behind_rounded_block(walker: BlockWalker) -> BlockStep:
    """The full-precision block 1, behind a block 0 that was rounded: its two streams differ."""
    steps = walker.walk()
    quantize_block(walker, next(steps), BlockAPConfig(SPEC, fit=FitConfig(epochs=0)))
    return next(steps)


def step_to_fit(walker: BlockWalker, spec: QuantSpec = SPEC) -> BlockStep:
    """Block 0 on its min-max grid, fake-quantized; the FP stream holds its targets."""
    step = next(walker.walk())
    walker.advance_fp(step)
    for path, linear in ARCH.named_linears(step.block):
        grid = initial_grid(linear.weight, spec, layer=path, init="minmax")
        set_submodule(step.block, path, to_fake(linear, grid, spec))
    return step


@torch.no_grad()
def loss_on(walker: BlockWalker, step: BlockStep, samples: range) -> float:
    """Mean block loss, one sample at a time."""
    losses = []
    for index in samples:
        output = walker.run(step.block, step.calls[index], step.quantized.read(index))
        losses.append(block_loss(output, step.fp.read(index)).item())
    return sum(losses) / len(losses)


@torch.no_grad()
def mean_loss(model: nn.Module, windows: Tensor, teacher: nn.Module | None) -> float:
    """Mean loss per predicted token of windows [n, T], against a teacher or their own tokens."""
    columns, labels = predictions_that_count(windows)
    logits = model(input_ids=windows).logits[:, columns]
    if teacher is None:
        return cross_entropy(logits, labels).item()
    return kl_divergence(logits, teacher(input_ids=windows).logits[:, columns], labels).item()


def same(left: nn.Module, right: nn.Module) -> bool:
    """Whether all parameters and buffers of two modules are equal."""
    a, b = left.state_dict(), right.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def values_of(module: nn.Module) -> dict[str, Tensor]:
    """Copies of all parameters and buffers by name."""
    return {name: value.detach().clone() for name, value in module.state_dict().items()}
