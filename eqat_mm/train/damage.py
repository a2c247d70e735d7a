"""What rounding the linears of one unit alone does to a model: nats per token of KL to itself, not rounded.

Measured, or from gradients. To second order the KL is half of d^T F d, where d is what rounding changes the weights by,
and F the mean of g g^T over gradients g of log-likelihoods of tokens that the model itself draws. Here g . d is that of
each row, so the actual error counts, with its signs; what different rows do is taken as independent. That costs one
backward for each window, whatever the number of units and widths.

Shape letters: O outputs, I inputs, G groups, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from eqat_mm.quant.grid import as_stored, dequantize, quantize
from eqat_mm.quant.init import initial_grid
from eqat_mm.quant.spec import QuantSpec
from eqat_mm.runtime.precision import Decided
from eqat_mm.runtime.progress import progress
from eqat_mm.train.held_out import logits_at
from eqat_mm.train.losses import cross_entropy

Rounding = Literal["minmax", "search"]
Damages = list[list[float]]
"""Of each unit, in each width."""


def damage_by_kl(
    units: Sequence[Sequence[nn.Linear]],
    specs: Sequence[QuantSpec],
    rounding: Rounding,
    divergence: Callable[[], float],
) -> Damages:
    """Round each unit in turn, measure, and put it back.

    Args:
        units: linears of a full-precision model.
        specs: of each width.
        rounding: what grids are taken; see `eqat_mm.quant.init`.
        divergence: returns the KL of the model as it is then.
    """
    return [
        [_alone(linears, spec, rounding, divergence) for spec in specs]
        for linears in progress(units, what="damage", total=len(units), unit="unit")
    ]


@torch.no_grad()
def _alone(linears: Sequence[nn.Linear], spec: QuantSpec, rounding: Rounding, divergence: Callable[[], float]) -> float:
    kept = [linear.weight.data for linear in linears]
    for linear, weight in zip(linears, kept, strict=True):
        linear.weight.data = _Rounded(weight, spec, rounding).of(weight).to(weight.dtype)
    found = divergence()
    for linear, weight in zip(linears, kept, strict=True):
        linear.weight.data = weight
    return found


def damage_by_gradient(
    model: Any,
    units: Sequence[Sequence[nn.Linear]],
    specs: Sequence[QuantSpec],
    rounding: Rounding,
    windows: Tensor,
    precision: Decided,
    seed: int,
) -> Damages:
    """Return what gradients say that rounding each unit alone does.

    Args:
        model: in full precision, on its device; nothing of it is trained.
        units: its linears.
        specs: of each width.
        rounding: what grids are taken.
        windows: token ids, int64 [n, T].
        precision: of matrix products.
        seed: of the tokens that the model draws.
    """
    device = windows.device
    draw = torch.Generator(device).manual_seed(seed)
    squares = torch.zeros(len(units), len(specs), dtype=torch.float64, device=device)
    model.requires_grad_(False)
    hooks = [
        _note(linear, [_Rounded(linear.weight.data, spec, rounding) for spec in specs], squares[index])
        for index, linears in enumerate(progress(units, what="grids", total=len(units), unit="unit"))
        for linear in linears
    ]
    for window in progress(windows, what="gradients", total=len(windows), unit="window"):
        columns = torch.arange(len(window) - 1, device=device)
        logits = logits_at(model, {"input_ids": window.unsqueeze(0)}, columns, precision)
        cross_entropy(logits, _drawn(logits.detach()[0], draw).unsqueeze(0), 1).backward()
    for hook in hooks:
        hook.remove()
    model.requires_grad_(False)
    found: Damages = (squares / (2 * windows[:, 1:].numel())).tolist()
    return found


def _note(linear: nn.Linear, roundings: Sequence[_Rounded], squares: Tensor) -> Any:
    """Let the gradient of a weight be added to `squares`, one number for each width, and forgotten."""

    def add(weight: Tensor) -> None:
        gradient, weight.grad = weight.grad, None
        assert gradient is not None
        for index, rounding in enumerate(roundings):
            change = rounding.of(weight.detach()) - weight.detach().float()
            squares[index] += (gradient.float() * change).sum(1).double().square().sum()

    linear.weight.requires_grad_(True)
    return linear.weight.register_post_accumulate_grad_hook(add)


def _drawn(logits: Tensor, draw: torch.Generator) -> Tensor:
    """Return a token for each row of logits [rows, V], as the model itself would go on."""
    rows = [torch.multinomial(part.float().softmax(-1), 1, generator=draw) for part in logits.split(256)]
    return torch.cat(rows).squeeze(-1)


class _Rounded:
    """The grid of a weight [O, I], with step sizes [O, G] as they are stored."""

    def __init__(self, weight: Tensor, spec: QuantSpec, rounding: Rounding) -> None:
        alike = torch.ones(1, device=weight.device).expand(weight.shape[1], weight.shape[1])  # which takes no memory
        grid = initial_grid(weight, spec, layer="weight", init=rounding, hessian=alike)
        self.spec, self.scale, self.zero_point = spec, as_stored(grid.scale, spec).float(), grid.zero_point

    @torch.no_grad()
    def of(self, weight: Tensor) -> Tensor:
        """Return the weight on this grid, float32 [O, I]."""
        codes = quantize(weight.float(), self.scale, self.zero_point, self.spec)
        return dequantize(codes, self.scale, self.zero_point)
