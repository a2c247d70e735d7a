"""Recording how a model calls its blocks, with the model's own forward.

Each block is replaced for the time of the capture by a recorder that keeps the complete arguments of its call
and passes the hidden states on unchanged; the last one ends the forward. Masks, position ids and rotary tables
therefore come from the model itself, per block, and the weights of the blocks are never needed.

Tensors that are equal are kept once, whatever the number of samples and blocks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from eqat_mm.blocks.arch import Inputs
from eqat_mm.errors import AdapterError


@dataclass(frozen=True)
class BlockCall:
    """Everything but the hidden states of one call of one block.

    Attributes:
        args: positional arguments after the hidden states.
        kwargs: keyword arguments.
        batch: size of the batch dimension of the call.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    batch: int


@dataclass(frozen=True)
class Sample:
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


def digest_of(value: Tensor) -> bytes:
    """Return a hash of the contents of a contiguous tensor on the CPU."""
    return hashlib.blake2b(value.view(-1).view(torch.uint8).numpy().data, digest_size=16).digest()


@torch.no_grad()
def capture(model: nn.Module, blocks: nn.ModuleList, batches: Iterable[Inputs]) -> Iterator[Sample]:
    """Run `model` on each batch up to its blocks and record every block's call.

    Args:
        model: its parts before the blocks hold weights; the blocks may be on the meta device.
        blocks: the decoder blocks of `model`.
        batches: keyword arguments of the model's forward; one `Sample` is made of each.

    Yields:
        One sample per batch, on the CPU.

    Raises:
        AdapterError: a forward ended without the last block.
    """
    pool = TensorPool()
    recorded: list[tuple[Tensor, tuple[Any, ...], dict[str, Any]]] = []
    last = len(blocks) - 1

    def recorder(index: int) -> Any:
        def record(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            recorded.append((hidden, args, kwargs))
            if index == last:
                raise _LastBlockReached
            return hidden

        return record

    for index, block in enumerate(blocks):
        block.forward = recorder(index)
    try:
        for inputs in batches:
            recorded.clear()
            try:
                model(**inputs, use_cache=False)
            except _LastBlockReached:
                yield _sample(recorded, pool)
            else:
                raise _unreached(len(recorded), len(blocks))
    finally:
        for block in blocks:
            del block.forward


def _unreached(called: int, count: int) -> AdapterError:
    return AdapterError(
        where="capture of the decoder blocks",
        given=f"a forward that ended after {called} of {count} blocks",
        allowed="a model that passes its hidden states through every block of the adapter's list",
        do="correct the path of the decoder blocks in the adapter",
    )


def _sample(recorded: list[tuple[Tensor, tuple[Any, ...], dict[str, Any]]], pool: TensorPool) -> Sample:
    hidden = recorded[0][0].detach().cpu()
    interned: dict[int, Any] = {}  # blocks mostly get the same objects: each is looked at once

    def intern(leaf: Any) -> Any:
        if id(leaf) not in interned:
            interned[id(leaf)] = pool.intern(leaf)
        return interned[id(leaf)]

    calls = []
    for _, args, kwargs in recorded:
        call_args, call_kwargs = pytree.tree_map(intern, (args, kwargs))
        calls.append(BlockCall(call_args, call_kwargs, batch=hidden.shape[0]))
    return Sample(hidden, tuple(calls))


def map_tensors(function: Callable[[Tensor], Tensor], call: BlockCall) -> BlockCall:
    """Return the call with `function` applied to each of its tensors."""
    args, kwargs = pytree.tree_map(
        lambda leaf: function(leaf) if isinstance(leaf, Tensor) else leaf, (call.args, call.kwargs)
    )
    return BlockCall(args, kwargs, call.batch)


def collate(calls: Sequence[BlockCall]) -> BlockCall:
    """Join calls of one block into one call on the concatenation of their batches.

    A leaf that is the same object everywhere and does not carry the batch is kept; tensors whose first
    dimension is the batch are expanded (same object) or concatenated. The calls must agree in
    `signature`.
    """
    if len(calls) == 1:
        return calls[0]
    flat, structure = zip(*(pytree.tree_flatten((call.args, call.kwargs)) for call in calls), strict=True)
    leaves = [_join(column, calls) for column in zip(*flat, strict=True)]
    args, kwargs = pytree.tree_unflatten(leaves, structure[0])
    return BlockCall(args, kwargs, batch=sum(call.batch for call in calls))


def _join(column: tuple[Any, ...], calls: Sequence[BlockCall]) -> Any:
    first = column[0]
    if not _carries_batch(first, calls[0].batch):
        return first
    if all(leaf is first for leaf in column) and first.shape[0] == 1:
        return first.expand(sum(call.batch for call in calls), *first.shape[1:])
    return torch.cat(column)


def _carries_batch(leaf: Any, batch: int) -> bool:
    return isinstance(leaf, Tensor) and leaf.ndim >= 2 and leaf.shape[0] == batch


def signature(call: BlockCall, hidden_shape: torch.Size, identity: Callable[[Tensor], Any] = id) -> tuple[Any, ...]:
    """Return a hashable value; calls with equal signatures can be collated.

    Leaves that carry the batch count by shape and dtype, other tensors by `identity`, the rest by value.
    """
    leaves, structure = pytree.tree_flatten((call.args, call.kwargs))
    described: list[Any] = []
    for leaf in leaves:
        if _carries_batch(leaf, call.batch):
            described.append((leaf.shape[1:], leaf.dtype))
        else:
            described.append(identity(leaf) if isinstance(leaf, Tensor) else leaf)
    return (hidden_shape[1:], str(structure), *described)
