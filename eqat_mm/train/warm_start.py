"""Where the grids of a block start.

`minmax` is the paper's. The others go through the stages of the block in the order data passes them, each
measured on the quantized stream behind the stages already rounded. `gptq` and `refined` first move each weight to the
least-squares one that makes up for the difference between the two streams,

    W' = W + D (H + damping)^-1,   H = sum x_q x_q^T,   D = sum d x_q^T,

where d is what the layer's output lacks: W (x_fp - x_q), or, for a layer whose output is added to the residual
stream, the difference of the two sums. Then they round with error compensation. Training continues from there.

Where the sums are known, each token counts by `train.losses.token_weights`.
H and D are summed up in `train.stage_statistics`. Experts that hardly any token is sent to start from a search on
their weights.

Shape letters: I inputs, O outputs.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from eqat_mm.blocks.walker import BlockStep, BlockWalker
from eqat_mm.quant.gptq import damp
from eqat_mm.quant.grid import dequantize, quantize
from eqat_mm.quant.init import Grid, Init, initial_grid
from eqat_mm.quant.spec import QuantSpec
from eqat_mm.runtime.progress import say
from eqat_mm.runtime.settings import Count, Positive, Settings
from eqat_mm.train.broken_block import broken_block
from eqat_mm.train.stage_statistics import StageStatistics, collect, rounds_at_a_time

MORE_DAMPING = (0.0, 0.5, 5.0)
"""Damping in addition, tried in turn, where statistics cannot be inverted."""


@dataclass(frozen=True)
class WarmStartConfig(Settings, option="start"):
    """How a block's grids are initialised.

    Attributes:
        init: `minmax` (paper), `search` (least weighted error), `gptq` (search, stream correction, GPTQ), or `refined`
            (after GPTQ, step sizes and codes in turn).
        samples: calibration samples for the statistics of all but `minmax`.
        correction_damping: damping of the stream correction, as a fraction of the Hessian's mean diagonal.
    """

    init: Init = "minmax"
    samples: Count = 64
    correction_damping: Positive = 0.05


@torch.no_grad()
def initial_grids(
    walker: BlockWalker, step: BlockStep, spec: QuantSpec, config: WarmStartConfig, samples: Sequence[int]
) -> dict[str, Grid]:
    """Return the initial grid of every linear of the full-precision block of `step`, by path inside the block.

    Both streams must stand at the block's input. The block is not changed. Statistics are taken on the first
    `config.samples` of `samples`, which are those to be trained on, numbered over all ranks; all get the same sums.

    Raises:
        ConfigError: the group size does not divide a layer.
        TrainingError: statistics that cannot be used, however much they are damped.
    """
    arch = walker.opened.arch
    if config.init == "minmax":
        return {
            path: initial_grid(
                linear.weight, spec.of(f"{step.name}.{path}"), layer=f"{step.name}.{path}", init="minmax"
            )
            for path, linear in arch.named_linears(step.block)
        }
    grids: dict[str, Grid] = {}
    working = copy.deepcopy(step.block)
    for measured in rounds_at_a_time(arch, working):
        statistics = collect(walker, step, working, measured, samples[: config.samples])
        _say_of_tokens(step.name, statistics)
        for stage, seen in zip(measured.stages, statistics, strict=True):
            for path in stage:
                try:
                    layer = f"{step.name}.{path}"
                    grids[path] = _round(working.get_submodule(path), seen, spec.of(layer), config, layer)
                except LinAlgError as error:
                    seen_there = f"{path}: statistics of its inputs that cannot be inverted"
                    raise broken_block(walker, step, seen_there) from error
    return grids


def _round(linear: nn.Module, seen: StageStatistics, spec: QuantSpec, config: WarmStartConfig, layer: str) -> Grid:
    """Return the grid of a layer, and round the layer to it."""
    assert isinstance(linear, nn.Linear)
    weight, grid = _grid_of(linear.weight, seen, spec, config, layer)
    start = weight if grid.weight is None else grid.weight
    codes = quantize(start, grid.scale, grid.zero_point, spec)
    linear.weight = nn.Parameter(dequantize(codes, grid.scale, grid.zero_point), requires_grad=False)
    return grid


def _say_of_tokens(block: str, statistics: Sequence[StageStatistics]) -> None:
    """Say how many experts get a grid without statistics, or without a correction of their weights."""
    few, uncorrected = (sum(each) for each in zip(*((seen.few, not seen.corrects) for seen in statistics), strict=True))
    tokens = [seen.tokens for seen in statistics]
    if uncorrected:
        say(
            f"{block}: {len(tokens)} experts were sent {min(tokens):,} to {max(tokens):,} calibration tokens; "
            f"{uncorrected} too few for a stream correction, {few} of these for statistics: searched on weights alone"
        )


def _grid_of(
    weight: Tensor, seen: StageStatistics, spec: QuantSpec, config: WarmStartConfig, layer: str
) -> tuple[Tensor, Grid]:
    """Return the weight that a layer is rounded from, and its grid; damp the statistics until they can be inverted."""
    if seen.few:
        alike = torch.eye(weight.shape[1], device=weight.device)
        return weight, initial_grid(weight, spec, layer=layer, init="search", hessian=alike)
    for more in MORE_DAMPING:
        try:
            return _grid_at(weight, seen, spec, config, layer, more)
        except LinAlgError:
            if more == MORE_DAMPING[-1] or not seen.hessian_II.isfinite().all():
                raise
        say(f"{layer}: its statistics cannot be inverted as they are, they are damped more")
    raise AssertionError("unreachable")


def _grid_at(
    weight: Tensor, seen: StageStatistics, spec: QuantSpec, config: WarmStartConfig, layer: str, more: float
) -> tuple[Tensor, Grid]:
    if config.init in ("gptq", "refined") and seen.corrects:
        weight = weight + seen.correction(weight, config.correction_damping + more)
    hessian = damp(seen.hessian_II, more) if more else seen.hessian_II
    return weight, initial_grid(weight, spec, layer=layer, init=config.init, hessian=hessian)
