"""Where the grids of a block start.

`minmax` is the paper's. The others go through the stages of the block in the order data passes them, each
measured on the quantized stream behind the stages already rounded. `gptq` and `refined` first move each weight to the
least-squares one that makes up for the difference between the two streams,

    W' = W + D (H + damping)^-1,   H = sum x_q x_q^T,   D = sum d x_q^T,

where d is what the layer's output lacks: W (x_fp - x_q), or, for a layer whose output is added to the residual
stream, the difference of the two sums. Then they round with error compensation. Training continues from there.

Where the sums are known, each token counts by `train.losses.token_weights`.

Shape letters: T tokens, I inputs, O outputs.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from eqat_mm.blocks.arch import Arch
from eqat_mm.blocks.capture import BlockCall
from eqat_mm.blocks.walker import BlockStep, BlockWalker
from eqat_mm.quant.gptq import damp
from eqat_mm.quant.grid import dequantize, quantize
from eqat_mm.quant.init import Grid, Init, initial_grid
from eqat_mm.quant.spec import QuantSpec
from eqat_mm.runtime.progress import say
from eqat_mm.runtime.settings import Count, Positive, Settings
from eqat_mm.train.broken_block import broken_block
from eqat_mm.train.losses import token_weights

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
            path: initial_grid(linear.weight, spec, layer=f"{step.name}.{path}", init="minmax")
            for path, linear in arch.named_linears(step.block)
        }
    grids: dict[str, Grid] = {}
    working = copy.deepcopy(step.block)
    for stage in arch.stages_of(step.block):
        seen = _Statistics.collect(walker, step, working, arch, stage, samples[: config.samples])
        for path in stage:
            linear = working.get_submodule(path)
            assert isinstance(linear, nn.Linear)
            try:
                weight, grid = _grid_of(linear.weight, seen, spec, config, f"{step.name}.{path}")
            except LinAlgError as error:
                seen_there = f"{path}: statistics of its inputs that cannot be inverted"
                raise broken_block(walker, step, seen_there) from error
            start = weight if grid.weight is None else grid.weight
            codes = quantize(start, grid.scale, grid.zero_point, spec)
            linear.weight = nn.Parameter(dequantize(codes, grid.scale, grid.zero_point), requires_grad=False)
            grids[path] = grid
    return grids


def _grid_of(
    weight: Tensor, seen: _Statistics, spec: QuantSpec, config: WarmStartConfig, layer: str
) -> tuple[Tensor, Grid]:
    """Return the weight that a layer is rounded from, and its grid; damp the statistics until they can be inverted."""
    for more in MORE_DAMPING:
        try:
            return _grid_at(weight, seen, spec, config, layer, more)
        except LinAlgError:
            if more == MORE_DAMPING[-1] or not seen.hessian_II.isfinite().all():
                raise
        say(f"{layer}: its statistics cannot be inverted as they are, they are damped more")
    raise AssertionError("unreachable")


def _grid_at(
    weight: Tensor, seen: _Statistics, spec: QuantSpec, config: WarmStartConfig, layer: str, more: float
) -> tuple[Tensor, Grid]:
    if config.init in ("gptq", "refined"):
        weight = weight + seen.correction(weight, config.correction_damping + more)
    hessian = damp(seen.hessian_II, more) if more else seen.hessian_II
    return weight, initial_grid(weight, spec, layer=layer, init=config.init, hessian=hessian)


@dataclass
class _Statistics:
    """Sums over calibration tokens at the input of one stage.

    Attributes:
        hessian_II: sum of x_q x_q^T.
        lack: sum of d x_q^T: [O, I] with the residual sums of a single linear, or [I, I] to be multiplied by W.
        of_output: whether `lack` is [O, I].
    """

    hessian_II: Tensor
    lack: Tensor
    of_output: bool

    @classmethod
    def collect(
        cls,
        walker: BlockWalker,
        step: BlockStep,
        working: nn.Module,
        arch: Arch,
        stage: tuple[str, ...],
        samples: Sequence[int],
    ) -> _Statistics:
        """Run the full-precision block on the FP stream and `working` on the quantized stream up to the stage.

        Each rank does so with its samples, and all get the sums over those of all.
        """
        sums = dict(arch.sums)
        of_output = len(stage) == 1 and stage[0] in sums
        total: _Statistics | None = None
        order = step.batches(samples, walker.batch_tokens)
        for share, (fp, quantized) in walker.parts(step, [step.fp, step.quantized], order):
            if not share.mine:
                if of_output:
                    share.joined(quantized)  # the others ask for the energies of all
                continue
            call = step.call(share.mine)
            paths = (stage[0], sums[stage[0]]) if of_output else (stage[0],)
            x_fp, *sum_fp = _inputs_of(step.block, paths, walker, call, fp)
            x_q, *sum_q = _inputs_of(working, paths, walker, call, quantized)
            d = x_fp - x_q
            if of_output:
                weight_T1 = token_weights(sum_q[0], share.joined)
                x_q, d = x_q * weight_T1.sqrt(), (sum_fp[0] - sum_q[0]) * weight_T1.sqrt()
            part = cls(x_q.T @ x_q, d.T @ x_q, of_output)
            total = part if total is None else total._plus(part)
        total = total or cls._zeros(working.get_submodule(stage[0]), of_output)
        walker.ranks.sum_all_([total.hessian_II, total.lack])
        return total

    @classmethod
    def _zeros(cls, linear: nn.Module, of_output: bool) -> _Statistics:
        """Return the sums over no token."""
        assert isinstance(linear, nn.Linear)
        inputs, lacking = linear.in_features, linear.out_features if of_output else linear.in_features
        return cls(linear.weight.new_zeros(inputs, inputs), linear.weight.new_zeros(lacking, inputs), of_output)

    def correction(self, weight_OI: Tensor, damping: float) -> Tensor:
        """Return D (H + damping)^-1, [O, I]."""
        lack_OI = self.lack if self.of_output else weight_OI @ self.lack
        solved: Tensor = torch.linalg.solve(damp(self.hessian_II, damping), lack_OI, left=False)
        return solved

    def _plus(self, other: _Statistics) -> _Statistics:
        return _Statistics(self.hessian_II.add_(other.hessian_II), self.lack.add_(other.lack), self.of_output)


class _Reached(Exception):
    """Ends a block's forward once every wanted input was seen."""


def _inputs_of(
    block: nn.Module, paths: tuple[str, ...], walker: BlockWalker, call: BlockCall, hidden: Tensor
) -> list[Tensor]:
    """Return the inputs [T, .] of the modules at `paths`, in the order of the data, when `block` is called.

    The empty path stands for the block's output.
    """
    seen: list[Tensor] = []
    wanted = [path for path in paths if path]

    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen.append(args[0].flatten(0, -2).float())
        if len(seen) == len(paths):
            raise _Reached

    handles = [block.get_submodule(path).register_forward_pre_hook(hook) for path in wanted]
    try:
        output = walker.run(block, call, hidden)
        seen.append(output.flatten(0, -2).float())
    except _Reached:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return seen
