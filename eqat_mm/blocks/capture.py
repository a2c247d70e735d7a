"""Recording how a model calls its blocks, with the model's own forward.

Each block is replaced for the time of the capture by a recorder that keeps the complete arguments of its call
and returns zeros in place of hidden states, in what the block would return; the last one ends the forward. Masks,
position ids and rotary tables therefore come from the model itself, per block, and the weights of the blocks are never
needed. What a block then receives in place of zeros is what the model adds between two blocks, and is kept as well.

Tensors that are equal are kept once, whatever the number of samples and blocks.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from eqat_mm.blocks.arch import Inputs
from eqat_mm.blocks.calls import BlockCall, digest_of
from eqat_mm.blocks.shared import (
    Seen,
    changed_objects,
    changes_shared,
    look_at,
    named_arguments,
    shared_arguments,
)
from eqat_mm.errors import AdapterError


@dataclass(frozen=True)
class CapturedSample:
    """One forward of the model up to its blocks.

    Attributes:
        hidden: input of block 0, [B, T, H].
        calls: one per block.
    """

    hidden: Tensor
    calls: tuple[BlockCall, ...]


class _LastBlockReached(Exception):
    """Ends a forward once every block has been recorded."""


class TensorPool:
    """Keeps one copy of equal tensors."""

    def __init__(self) -> None:
        self._tensors: dict[tuple[Any, ...], Tensor] = {}

    def intern(self, value: Any) -> Any:
        """Return the pooled equal of a tensor; anything else as it is."""
        if not isinstance(value, Tensor):
            return value
        value = value.detach().cpu().contiguous()
        return self._tensors.setdefault((value.dtype, value.shape, digest_of(value)), value)


@torch.no_grad()
def capture(model: nn.Module, blocks: nn.ModuleList, batches: Iterable[Inputs]) -> Iterator[CapturedSample]:
    """Run `model` on each batch up to its blocks and record every block's call.

    Args:
        model: its parts before the blocks hold weights; the blocks may be on the meta device.
        blocks: the decoder blocks of `model`.
        batches: keyword arguments of the model's forward; one `CapturedSample` is made of each.

    Yields:
        One sample per batch, on the CPU.

    Raises:
        AdapterError: a forward ended without the last block, called blocks in another order, or hands blocks an object
            that one of them changes.
    """
    pool = TensorPool()
    recorded: list[_Recorded] = []
    for index, block in enumerate(blocks):
        block.forward = _Recorder(block, index, len(blocks), recorded)
    try:
        for inputs in batches:
            recorded.clear()
            try:
                model(**inputs, use_cache=False)
            except _LastBlockReached:
                sample = _sample(recorded, pool)
                _require_unchanged(sample, blocks)
                yield sample
            else:
                raise _unreached(len(recorded), len(blocks))
    finally:
        for block in blocks:
            del block.forward


class _Recorded(NamedTuple):
    """Hidden states and arguments of one call; `added` as in `BlockCall`."""

    hidden: Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    added: Tensor | None

    @property
    def arguments(self) -> dict[str, Any]:
        """Arguments behind the hidden states by name."""
        return named_arguments(self.args, self.kwargs)


class _Recorder:
    """Stands in for the forward of one of `count` blocks, and appends its calls to `recorded`."""

    def __init__(self, block: nn.Module, index: int, count: int, recorded: list[_Recorded]) -> None:
        self.block, self.index, self.count, self.recorded = block, index, count, recorded
        self.tried: _Tried | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Record a call and return what the block would, with zeros for hidden states."""
        hidden, args = (args[0], args[1:]) if args else (kwargs.pop("hidden_states"), args)
        if len(self.recorded) != self.index:
            raise _out_of_order(self.index, len(self.recorded))
        # every block before returned zeros: what is not zero the model has added
        added = hidden if self.index and bool(hidden.any()) else None
        self.recorded.append(_Recorded(hidden, args, kwargs, added))
        if len(self.recorded) == self.count:
            raise _LastBlockReached
        if self.tried is None:
            self.tried = _try(self.block, hidden, args, kwargs)
        zeros = torch.zeros_like(hidden)
        return zeros if self.tried.more < 0 else (zeros, *[None] * self.tried.more)


class _Tried(NamedTuple):
    """What is found out about a block.

    Attributes:
        more: how many values it returns behind the hidden states, -1 where it returns those alone, not in a tuple.
        changed: objects in its arguments that it changes: (argument, object).
    """

    more: int = -1
    changed: tuple[tuple[str, Any], ...] = ()


def _try(block: nn.Module, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Tried:
    """Find out what a block returns and changes.

    Nothing is computed: the block's own forward runs on fake tensors. One that decides by values, or whose parameters
    are on the meta device, cannot; it is taken to return hidden states alone, as most do.
    """
    looked_at: dict[str, list[Seen]] = {}
    try:
        own = pytree.tree_map_only(lambda leaf: not isinstance(leaf, Tensor | nn.Module), copy.deepcopy, (args, kwargs))
        with _quiet(), FakeTensorMode(allow_non_fake_inputs=True) as fake:
            first, (args, kwargs) = pytree.tree_map_only(Tensor, fake.from_tensor, (hidden, own))
            looked_at = look_at(named_arguments(args, kwargs))
            output = type(block).forward(block, first, *args, **kwargs)
            more = len(output) - 1 if isinstance(output, tuple) else -1
    except Exception:  # noqa: BLE001 - whatever a model's own code raises on tensors without values
        more = -1
    return _Tried(more, tuple(changed_objects(looked_at)))


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep torch from printing why an operator cannot be tried on fake tensors."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before


def _require_unchanged(sample: CapturedSample, blocks: nn.ModuleList) -> None:
    for index, (block, call) in enumerate(zip(blocks, sample.calls, strict=True)):
        recorder: Any = block.forward
        tried: _Tried | None = recorder.tried
        for argument, value in () if tried is None else tried.changed:
            if argument in call.shared:
                raise changes_shared(block, f"block {index}", argument, value)


def _out_of_order(index: int, expected: int) -> AdapterError:
    return AdapterError(
        where="capture of the decoder blocks",
        given=f"block {index} called where block {expected} should be",
        allowed="a model that calls every block of the adapter's list once, in order",
        do="this model skips or repeats blocks for such inputs, which the walker cannot; give it other inputs",
    )


def _unreached(called: int, count: int) -> AdapterError:
    return AdapterError(
        where="capture of the decoder blocks",
        given=f"a forward that ended after {called} of {count} blocks",
        allowed="a model that passes its hidden states through every block of the adapter's list",
        do="correct the path of the decoder blocks in the adapter",
    )


def _sample(recorded: list[_Recorded], pool: TensorPool) -> CapturedSample:
    hidden = recorded[0].hidden.detach().cpu()
    interned: dict[int, Any] = {}  # blocks mostly get the same objects: each is looked at once

    def intern(leaf: Any) -> Any:
        if id(leaf) not in interned:
            interned[id(leaf)] = pool.intern(leaf)
        return interned[id(leaf)]

    calls = []
    for one, shared in zip(recorded, shared_arguments([one.arguments for one in recorded]), strict=True):
        args, kwargs, added = pytree.tree_map(intern, one[1:])
        calls.append(BlockCall(args, kwargs, hidden.shape[0], added, shared))
    return CapturedSample(hidden, tuple(calls))
