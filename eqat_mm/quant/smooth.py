"""SmoothQuant (arXiv 2211.10438): moving outliers of activations into weights, where they cost less.

Activations of a few channels are large for every token; with one step size per token they leave the others few codes.
For the linears that read a norm, channel j of the norm's output is divided by t_j and column j of every weight is
multiplied by it, so the model computes what it did:

    t_j = max|X_j|^a / max|W_j|^(1-a)

X_j over calibration tokens, W_j over the outputs of all linears behind that norm, a between 0 (all the difficulty
stays in the activations) and 1 (all of it goes to the weights). The division is folded into the norm's own weight.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from eqat_mm.errors import AdapterError, ConfigError

SMALLEST = 1e-5
"""Ranges below this, of channels that are never used, count as this."""


class NormedLinears(NamedTuple):
    """A norm and what reads it.

    Attributes:
        path: of the norm, for messages.
        norm: scales its output by its parameter `weight`, [I].
        linears: all that read this output, weights [O, I].
    """

    path: str
    norm: nn.Module
    linears: Sequence[nn.Linear]


def smoothing_factors(range_I: Tensor, weights_OI: Sequence[Tensor], strength: float) -> Tensor:
    """Return t_j, float32 [I].

    Args:
        range_I: max|X_j| over tokens, float [I].
        weights_OI: of the linears that read X.
        strength: a, from 0 to 1.

    Raises:
        ConfigError: a strength outside 0 to 1.
    """
    require_strength(strength)
    of_weights_I = torch.stack([weight.detach().float().abs().amax(0) for weight in weights_OI]).amax(0)
    numerator = range_I.float().clamp(min=SMALLEST).pow(strength)
    return numerator / of_weights_I.clamp(min=SMALLEST).pow(1 - strength)


@torch.no_grad()
def smooth(
    model: nn.Module, places: Sequence[NormedLinears], batches: Iterable[dict[str, Any]], strength: float
) -> None:
    """Smooth `model` in place; it computes the same.

    Args:
        model: in full precision.
        places: its norms, and what reads them.
        batches: keyword arguments of its forward: calibration text.
        strength: a, from 0 to 1; 0.5 is the paper's.

    Raises:
        ConfigError: a strength outside 0 to 1.
        AdapterError: a norm whose output is not proportional to its `weight`.
    """
    require_strength(strength)
    for place in places:
        _require_scaling(place)
    with _ranges(places) as ranges:
        for inputs in batches:
            model(**inputs, use_cache=False)
    for place, range_I in zip(places, ranges, strict=True):
        fold(place, smoothing_factors(range_I, [linear.weight for linear in place.linears], strength))


@torch.no_grad()
def fold(place: NormedLinears, factors_I: Tensor) -> None:
    """Divide the output of a norm by `factors_I` and multiply the inputs of its linears by them."""
    for name in ("weight", "bias"):
        parameter = getattr(place.norm, name, None)
        if isinstance(parameter, Tensor):
            parameter.div_(factors_I.to(parameter.dtype))
    for linear in place.linears:
        linear.weight.mul_(factors_I.to(linear.weight.dtype))


def require_strength(strength: float) -> None:
    """Check the strength of the smoothing.

    Raises:
        ConfigError: it is outside 0 to 1.
    """
    if not 0 <= strength <= 1:
        raise ConfigError("--smooth", f"{strength:g}", "0 to 1", "use 0.5, or leave --smooth out")


@contextmanager
def _ranges(places: Sequence[NormedLinears]) -> Iterator[list[Tensor]]:
    """Yield max|X_j| of the inputs of each place, [I], which grow while the model runs."""
    ranges = [torch.zeros(place.linears[0].in_features, device=place.linears[0].weight.device) for place in places]

    def record(range_I: Tensor) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            torch.maximum(range_I, args[0].detach().float().abs().flatten(0, -2).amax(0), out=range_I)

        return hook

    handles = [
        place.linears[0].register_forward_pre_hook(record(range_I))
        for place, range_I in zip(places, ranges, strict=True)
    ]
    try:
        yield ranges
    finally:
        for handle in handles:
            handle.remove()


def _require_scaling(place: NormedLinears) -> None:
    """Check that halving the weight (and the bias) of the norm halves its output; 1 + weight, for one, does not."""
    features = place.linears[0].in_features
    probe = torch.linspace(-1, 2, features, device=place.linears[0].weight.device).unsqueeze(0)
    wanted = place.norm(probe) / 2
    fold(NormedLinears(place.path, place.norm, ()), torch.tensor(2.0, device=probe.device))
    given = place.norm(probe)
    fold(NormedLinears(place.path, place.norm, ()), torch.tensor(0.5, device=probe.device))
    if not torch.allclose(given, wanted):
        raise AdapterError(
            where=f"--smooth, at {place.path} ({type(place.norm).__name__})",
            given="a norm whose output is not proportional to its weight",
            allowed="norms that multiply by their weight, as RMSNorm and LayerNorm do",
            do="leave --smooth out for this model",
        )
