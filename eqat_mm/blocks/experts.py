"""Experts as files hold them: linears, one by one, where transformers merges those of a block into two parameters.

A merged module has `gate_up_proj`, [E, 2 F, H], and `down_proj`, [E, H, F]. It is replaced by one that computes the
same on three linears for each expert. So experts are read, quantized and written like any other linear, and no merged
parameter ever exists.

Shape letters: E experts, T tokens, K experts a token is sent to, H hidden size, F inner size of an expert.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from eqat_mm.errors import AdapterError

LAYOUT = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
"""Merged parameter -> the linears whose outputs are its rows, one behind the other."""

_ANOTHER = {"is_transposed": True, "is_concatenated": False, "has_bias": True, "has_gate": False}
"""What transformers says of merged experts that are laid out in another way."""


class Expert(nn.Module):
    """One expert: down(act(gate(x)) * up(x))."""

    gate_proj: nn.Linear
    up_proj: nn.Linear
    down_proj: nn.Linear
    act_fn: nn.Module

    def __init__(self, linears: dict[str, nn.Linear], act_fn: nn.Module) -> None:
        super().__init__()
        for name, linear in linears.items():
            self.add_module(name, linear)
        self.act_fn = act_fn

    def forward(self, x: Tensor) -> Tensor:
        """Return what the expert makes of its tokens, [T, H] -> [T, H]."""
        inner: Tensor = self.act_fn(self.gate_proj(x)) * self.up_proj(x)
        output: Tensor = self.down_proj(inner)
        return output


class SplitExperts(nn.ModuleList):
    """All experts of a block, called like the merged ones that they replace.

    Args:
        merged: transformers' module; the linears hold views of its parameters, which may be on the meta device.
        path: of the module, for messages.

    Raises:
        AdapterError: its parameters are laid out in another way.
    """

    def __init__(self, merged: Any, path: str) -> None:
        _require_layout(merged, path)
        super().__init__(_expert(merged, number) for number in range(merged.down_proj.shape[0]))

    @contextmanager
    def noted(self) -> Iterator[list[Tensor]]:
        """Yield a list that is filled, call by call, with the experts of each token."""
        calls: list[Tensor] = []

        def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            calls.append(self._named(args, kwargs)["top_k_index"])

        with self.register_forward_pre_hook(note, with_kwargs=True):
            yield calls

    @contextmanager
    def replayed(self, calls: Iterable[Tensor]) -> Iterator[None]:
        """Send tokens to the experts that are given, call by call, whatever the router says."""
        remaining = iter(calls)

        def replay(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[()], dict[str, Any]]:
            return (), self._named(args, kwargs) | {"top_k_index": next(remaining)}

        with self.register_forward_pre_hook(replay, with_kwargs=True):
            yield

    def _named(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        return inspect.signature(self.forward).bind(*args, **kwargs).arguments

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Return the sum of what its experts make of each token.

        In training every expert is called, with no token where none is sent to it: all processes must have gradients of
        the same parameters.

        Args:
            hidden_states: [T, H].
            top_k_index: experts of each token, integers [T, K].
            top_k_weights: how much each of them counts, [T, K].
        """
        total = torch.zeros_like(hidden_states)
        for number in range(len(self)) if self.training else top_k_index.unique().tolist():
            token, place = torch.where(top_k_index == number)
            output = self[number](hidden_states[token]) * top_k_weights[token, place, None]
            total.index_add_(0, token, output.to(total.dtype))
        return total


def is_merged(module: nn.Module) -> bool:
    """Whether a module holds experts in the parameters of `LAYOUT`."""
    shapes = {name: parameter.dim() for name, parameter in module.named_parameters(recurse=False)}
    return all(shapes.get(name) == 3 for name in LAYOUT)


def split_experts(root: nn.Module, paths: Iterable[str]) -> None:
    """Replace merged experts in place.

    Args:
        root: of the paths.
        paths: of modules; where there is none of that name, or no merged experts, nothing is done.

    Raises:
        AdapterError: parameters that are laid out in another way.
    """
    modules = dict(root.named_modules())
    for path in paths:
        if path in modules and is_merged(modules[path]):
            parent, _, leaf = path.rpartition(".")
            setattr(root.get_submodule(parent), leaf, SplitExperts(modules[path], path))


def _expert(merged: Any, number: int) -> Expert:
    linears = {}
    for parameter, names in LAYOUT.items():
        weight = getattr(merged, parameter)[number]
        for name, rows in zip(names, weight.chunk(len(names)), strict=True):
            linears[name] = nn.Linear(rows.shape[1], rows.shape[0], bias=False, device="meta")
            linears[name].weight = nn.Parameter(rows.detach(), requires_grad=weight.requires_grad)
    return Expert(linears, merged.act_fn)


def _require_layout(merged: Any, path: str) -> None:
    """Check that merged experts are laid out, and compute, as is taken for granted here."""
    (experts, rows, hidden), others = merged.gate_up_proj.shape, merged.down_proj.shape
    given = [name for name, value in _ANOTHER.items() if getattr(merged, name, not value) is value]
    if {name for name, _ in merged.named_parameters()} != LAYOUT.keys():
        given.append("further parameters")
    if others != (experts, hidden, rows // 2):
        given.append(f"gate_up_proj {[experts, rows, hidden]}, down_proj {list(others)}")
    if not given and not _gates_plainly(merged):
        given.append("a gate that is not act(gate) * up")
    if given:
        raise AdapterError(
            where=f"{path}: {type(merged).__name__}",
            given=", ".join(given),
            allowed="gate_up_proj [E, 2 F, H] and down_proj [E, H, F], no biases, down(act(gate) * up)",
            do="leave these experts out of the adapter's stages: they then stay in full precision",
        )


def _gates_plainly(merged: Any) -> bool:
    """Whether the module's gate is that of `Expert`; those of some models clamp, or count from one."""
    if not hasattr(merged, "_apply_gate"):
        return True
    probe = torch.linspace(-12, 12, 8, device="cpu")[None]
    gate, up = probe.chunk(2, -1)
    return torch.equal(merged._apply_gate(probe), merged.act_fn(gate) * up)
