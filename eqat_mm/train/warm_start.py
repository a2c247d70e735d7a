"""Where the grids of a block start.

`minmax` is the paper's. `search` and `gptq` go through the stages of the block in the order data passes them, each
measured on the quantized stream behind the stages already rounded. `gptq` first moves each weight towards what
makes up for the difference between the two streams,

    W' = W + W C (H + damping)^-1,   H = sum x_q x_q^T,   C = sum (x_fp - x_q) x_q^T,

the least-squares weight for the layer's full-precision output given its quantized input, then rounds with error
compensation. Training continues from W'.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from eqat_mm.blocks.capture import BlockCall
from eqat_mm.blocks.walker import BlockStep, BlockWalker
from eqat_mm.quant.gptq import damp
from eqat_mm.quant.grid import dequantize, quantize
from eqat_mm.quant.init import Grid, Init, initial_grid
from eqat_mm.quant.spec import QuantSpec


@dataclass(frozen=True)
class WarmStartConfig:
    """How a block's grids are initialised.

    Attributes:
        init: `minmax` (paper), `search` (least weighted error), or `gptq` (search, stream correction, GPTQ).
        samples: calibration samples for the statistics of `search` and `gptq`.
        correction_damping: damping of the stream correction, as a fraction of the Hessian's mean diagonal.
    """

    init: Init = "minmax"
    samples: int = 64
    correction_damping: float = 0.05


@torch.no_grad()
def initial_grids(walker: BlockWalker, step: BlockStep, spec: QuantSpec, config: WarmStartConfig) -> dict[str, Grid]:
    """Return the initial grid of every linear of the full-precision block of `step`, by path inside the block.

    Both streams must stand at the block's input. The block is not changed.

    Raises:
        ConfigError: the group size does not divide a layer.
    """
    grids: dict[str, Grid] = {}
    working = step.block if config.init == "minmax" else copy.deepcopy(step.block)
    for stage in walker.opened.arch.stages:
        hessian = shift = None
        if config.init != "minmax":
            hessian, shift = _statistics(walker, step, working, stage[0], config.samples)
        for path in stage:
            linear = working.get_submodule(path)
            assert isinstance(linear, nn.Linear)
            weight: Tensor = linear.weight
            if config.init == "gptq":
                assert hessian is not None
                assert shift is not None
                weight = weight + weight @ torch.linalg.solve(
                    damp(hessian, config.correction_damping), shift, left=False
                )
            grid = initial_grid(weight, spec, layer=f"{step.name}.{path}", init=config.init, hessian=hessian)
            if config.init != "minmax":
                rounded = weight if grid.weight is None else grid.weight
                codes = quantize(rounded, grid.scale, grid.zero_point, spec)
                linear.weight = nn.Parameter(dequantize(codes, grid.scale, grid.zero_point), requires_grad=False)
            grids[path] = grid
    return grids


class _Reached(Exception):
    """Ends a block's forward at the layer whose input was wanted."""


def _statistics(
    walker: BlockWalker, step: BlockStep, working: nn.Module, path: str, samples: int
) -> tuple[Tensor, Tensor]:
    """Return H = sum x_q x_q^T and C = sum (x_fp - x_q) x_q^T at the input of the linear at `path`, [I, I] each.

    x_fp is seen in the full-precision block on the FP stream, x_q in `working` on the quantized stream.
    """
    hessian = shift = None
    for indices in step.batches(range(min(samples, len(step.quantized))), walker.batch_tokens):
        call = step.call(indices)
        x_fp = _input_of(step.block, path, walker, call, step.fp.gather(indices))
        x_q = _input_of(working, path, walker, call, step.quantized.gather(indices))
        h, c = x_q.T @ x_q, (x_fp - x_q).T @ x_q
        hessian = h if hessian is None else hessian.add_(h)
        shift = c if shift is None else shift.add_(c)
    assert hessian is not None
    assert shift is not None
    return hessian, shift


def _input_of(block: nn.Module, path: str, walker: BlockWalker, call: BlockCall, hidden: Tensor) -> Tensor:
    """Return the input [T, I] of the linear at `path` when `block` is called on `hidden`."""
    seen: list[Tensor] = []

    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen.append(args[0].flatten(0, -2).float())
        raise _Reached

    handle = block.get_submodule(path).register_forward_pre_hook(hook)
    try:
        walker.run(block, call, hidden)
    except _Reached:
        pass
    finally:
        handle.remove()
    return seen[0]
