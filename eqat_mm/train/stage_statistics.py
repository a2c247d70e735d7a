"""Sums over calibration tokens at the inputs of a block's stages, from which grids start.

    H = sum x_q x_q^T,   D = sum d x_q^T

x_q is a stage's input in the quantized stream, behind the stages already rounded; d is what the output lacks, see
`train.warm_start`. Where the sums with the residual stream are known, tokens count by `train.losses.token_weights`;
where samples hold images or filling, by the weights of the step as well.

Of a mixture of experts the router of the quantized stream decides which tokens an expert is measured on, as it does
when the model is used. The FP stream's tokens are sent to the same experts, so x_fp and x_q are of one token, and d is
what the expert lacks on it.

Shape letters: T tokens, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from eqat_mm.blocks.arch import Arch, Round
from eqat_mm.blocks.calls import BlockCall
from eqat_mm.blocks.experts import SplitExperts
from eqat_mm.blocks.parts import Portion
from eqat_mm.blocks.walker import BlockStep, BlockWalker
from eqat_mm.quant.gptq import damp
from eqat_mm.train.losses import token_weights

FEW, MANY = 1, 8
"""Tokens for each input of an expert from which on its statistics count, and from which on its weights are corrected.

Of tiny models with random weights, rounding with statistics beats a search on the weights alone from one token on; the
stream correction fits its few tokens below eight, and pays above sixteen."""

NUMBERS = 1 << 28
"""Numbers in the Hessians of experts that are summed up at a time, 1 GiB, and as many in what they lack."""


@dataclass
class StageStatistics:
    """Sums over calibration tokens at the input of one stage.

    Attributes:
        hessian_II: sum of x_q x_q^T.
        lack: sum of d x_q^T: [O, I] with the residual sums of a single linear, or [I, I] to be multiplied by W.
        of_output: whether `lack` is [O, I].
        routed: whether a router decides which tokens pass the stage.
        tokens: that passed it.
    """

    hessian_II: Tensor
    lack: Tensor
    of_output: bool
    routed: bool
    tokens: int = 0

    @classmethod
    def zeros(cls, linear: nn.Module, *, of_output: bool, routed: bool) -> StageStatistics:
        """Return the sums over no token."""
        assert isinstance(linear, nn.Linear)
        inputs, lacking = linear.in_features, linear.out_features if of_output else linear.in_features
        new = linear.weight.new_zeros
        return cls(new(inputs, inputs), new(lacking, inputs), of_output, routed)

    @property
    def few(self) -> bool:
        """Whether an expert saw too few tokens for its sums to say anything about most directions of its input."""
        return self.routed and self.tokens < len(self.hessian_II) * FEW

    @property
    def corrects(self) -> bool:
        """Whether there were tokens enough to move weights by what the output lacks on them."""
        return not self.routed or self.tokens >= len(self.hessian_II) * MANY

    def add(self, x_q: Tensor, d: Tensor) -> None:
        """Add the sums over tokens, [T, I] and [T, .]."""
        self.hessian_II += x_q.T @ x_q
        self.lack += d.T @ x_q
        self.tokens += len(x_q)

    def correction(self, weight_OI: Tensor, damping: float) -> Tensor:
        """Return D (H + damping)^-1, [O, I]."""
        lack_OI = self.lack if self.of_output else weight_OI @ self.lack
        solved: Tensor = torch.linalg.solve(damp(self.hessian_II, damping), lack_OI, left=False)
        return solved


def rounds_at_a_time(arch: Arch, block: nn.Module) -> Iterator[Round]:
    """Yield what one pass of the streams measures: a stage, or the experts whose sums there is room for."""
    for measured in arch.rounds_of(block):
        linear = block.get_submodule(measured.stages[0][0])
        assert isinstance(linear, nn.Linear)
        inputs = linear.in_features
        count = max(1, NUMBERS // inputs**2)
        for at in range(0, len(measured.stages), count):
            yield measured._replace(stages=measured.stages[at : at + count])


def collect(
    walker: BlockWalker, step: BlockStep, working: nn.Module, measured: Round, samples: Sequence[int]
) -> list[StageStatistics]:
    """Run `working` on the quantized stream and the full-precision block on the FP stream up to some stages.

    Each rank does so with its samples, and all get the sums over those of all.
    """
    sums, first = dict(walker.opened.arch.sums), measured.stages[0]
    behind = sums.get(first[0]) if len(first) == 1 and measured.experts is None else None
    of_output, routed = behind is not None, measured.experts is not None
    linears = [working.get_submodule(stage[0]) for stage in measured.stages]
    totals = [StageStatistics.zeros(linear, of_output=of_output, routed=routed) for linear in linears]
    paths = [stage[0] for stage in measured.stages] + ([behind] if behind is not None else [])
    order = step.batches(samples, walker.batch_tokens)
    for share, (fp, quantized) in walker.parts(step, [step.fp, step.quantized], order):
        if not share.mine:
            if of_output:
                share.joined(quantized)  # the others ask for the energies of all
            continue
        call = step.call(share.mine)
        with _noted(working, measured.experts) as routing:
            of_q = _inputs_of(working, paths, walker, call, quantized)
        with _replayed(step.block, measured.experts, routing):
            of_fp = _inputs_of(step.block, paths, walker, call, fp)
        for (path, *_), total in zip(measured.stages, totals, strict=True):
            if path in of_q:  # an expert that no token is sent to is not called
                weights = _weights_at(step.weights_of(share.mine), measured.experts, routing, path)
                total.add(*_pair(of_fp, of_q, path, behind, share, weights))
    counts = torch.tensor([total.tokens for total in totals], dtype=torch.float32, device=walker.device)
    walker.ranks.sum_all_([*(total.hessian_II for total in totals), *(total.lack for total in totals), counts])
    for total, count in zip(totals, counts.tolist(), strict=True):
        total.tokens = int(count)
    return totals


def _weights_at(weights: Tensor | None, experts: str | None, routing: list[Tensor], path: str) -> Tensor | None:
    """Return how much the tokens [T] that pass a stage count, of an expert those that are sent to it."""
    if weights is None or experts is None:
        return None if weights is None else weights.flatten()
    number = int(path.removeprefix(f"{experts}.").partition(".")[0])
    return weights.flatten()[torch.where(routing[0] == number)[0]]


def _pair(
    of_fp: dict[str, Tensor],
    of_q: dict[str, Tensor],
    path: str,
    behind: str | None,
    share: Portion,
    weights: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return the inputs of a stage, [T, I], and what they or its output lack, [T, .], of the tokens that count.

    They are weighted where `weights` [T] are given, and where sums are known.
    """
    lacking = path if behind is None else behind
    x_q, d = of_q[path], of_fp[lacking] - of_q[lacking]
    if behind is not None:
        counts_T1 = token_weights(of_q[behind], share.joined, weights)
    elif weights is not None:
        counts_T1 = weights.unsqueeze(-1)
    else:
        return x_q, d
    if weights is not None:
        x_q, d, counts_T1 = (each[weights > 0] for each in (x_q, d, counts_T1))
    root_T1 = counts_T1.sqrt()
    return x_q * root_T1, d * root_T1


@contextmanager
def _noted(block: nn.Module, experts: str | None) -> Iterator[list[Tensor]]:
    """Yield what is filled with the experts that tokens are sent to."""
    if experts is None:
        yield []
    else:
        with _experts_of(block, experts).noted() as routing:
            yield routing


@contextmanager
def _replayed(block: nn.Module, experts: str | None, routing: list[Tensor]) -> Iterator[None]:
    """Send tokens to the experts that they were sent to in the other stream, so that inputs are those of one token."""
    if experts is None:
        yield
    else:
        with _experts_of(block, experts).replayed(routing):
            yield


def _experts_of(block: nn.Module, path: str) -> SplitExperts:
    experts = block.get_submodule(path)
    assert isinstance(experts, SplitExperts), f"{path} is a {type(experts).__name__}"
    return experts


class _Reached(Exception):
    """Ends a block's forward once every wanted input was seen."""


def _inputs_of(
    block: nn.Module, paths: Sequence[str], walker: BlockWalker, call: BlockCall, hidden: Tensor
) -> dict[str, Tensor]:
    """Return the inputs [T, .] of those modules at `paths` that are called when `block` is.

    The empty path stands for the block's output.
    """
    seen: dict[str, Tensor] = {}

    def note(path: str, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen[path] = args[0].flatten(0, -2).float()
        if len(seen) == len(paths):
            raise _Reached

    wanted = [path for path in paths if path]
    handles = [block.get_submodule(path).register_forward_pre_hook(partial(note, path)) for path in wanted]
    try:
        output = walker.run(block, call, hidden)
        if "" in paths:
            seen[""] = output.flatten(0, -2).float()
    except _Reached:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return seen
