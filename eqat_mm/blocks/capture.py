"""Recording how a model calls its blocks, with the model's own forward.

Each block is replaced for the time of the capture by a recorder that keeps the complete arguments of its call
and returns zeros in place of hidden states, in what the block would return; the last one ends the forward. Masks,
position ids and rotary tables therefore come from the model itself, per block, and the weights of the blocks are never
needed. What a block then receives in place of zeros is what the model adds between two blocks, and is kept as well.

Tensors that are equal are kept once, whatever the number of samples and blocks.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
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
        added: what the model adds to the hidden states before it calls the block, [B, T, H]; None where nothing.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    batch: int
    added: Tensor | None = None

    @property
    def tree(self) -> tuple[tuple[Any, ...], dict[str, Any], Tensor | None]:
        """All that is recorded, as a tree of tensors and values."""
        return self.args, self.kwargs, self.added

    @classmethod
    def of(cls, tree: Any, batch: int) -> BlockCall:
        """Make a call of what `tree` gives."""
        args, kwargs, added = tree
        return cls(args, kwargs, batch, added)


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
        AdapterError: a forward ended without the last block, or called blocks in another order.
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
                yield _sample(recorded, pool)
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


class _Recorder:
    """Stands in for the forward of one of `count` blocks, and appends its calls to `recorded`."""

    def __init__(self, block: nn.Module, index: int, count: int, recorded: list[_Recorded]) -> None:
        self.block, self.index, self.count, self.recorded = block, index, count, recorded
        self._more: int | None = None

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
        if self._more is None:
            self._more = returned_beside_hidden(self.block, hidden, args, kwargs)
        zeros = torch.zeros_like(hidden)
        return zeros if self._more < 0 else (zeros, *[None] * self._more)


def returned_beside_hidden(block: nn.Module, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Return how many values a block returns behind the hidden states, -1 where it returns those alone, not in a tuple.

    Nothing is computed: the block's own forward runs on fake tensors. One that decides by values, or whose parameters
    are on the meta device, cannot; it is taken to return hidden states alone, as most do.
    """
    try:
        with _quiet(), FakeTensorMode(allow_non_fake_inputs=True) as fake:
            tree = pytree.tree_map_only(Tensor, fake.from_tensor, (hidden, args, kwargs))
            output = type(block).forward(block, tree[0], *tree[1], **tree[2])
    except Exception:  # noqa: BLE001 - whatever a model's own code raises on tensors without values
        return -1
    return len(output) - 1 if isinstance(output, tuple) else -1


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep torch from printing why an operator cannot be tried on fake tensors."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before


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


def _sample(recorded: list[_Recorded], pool: TensorPool) -> Sample:
    hidden = recorded[0].hidden.detach().cpu()
    interned: dict[int, Any] = {}  # blocks mostly get the same objects: each is looked at once

    def intern(leaf: Any) -> Any:
        if id(leaf) not in interned:
            interned[id(leaf)] = pool.intern(leaf)
        return interned[id(leaf)]

    calls = []
    for one in recorded:
        calls.append(BlockCall.of(pytree.tree_map(intern, one[1:]), hidden.shape[0]))
    return Sample(hidden, tuple(calls))


def map_tensors(function: Callable[[Tensor], Tensor], call: BlockCall) -> BlockCall:
    """Return the call with `function` applied to each of its tensors."""
    return BlockCall.of(pytree.tree_map_only(Tensor, function, call.tree), call.batch)


def collate(calls: Sequence[BlockCall]) -> BlockCall:
    """Join calls of one block into one call on the concatenation of their batches.

    A leaf that is the same object everywhere and does not carry the batch is kept; tensors whose first
    dimension is the batch are expanded (same object) or concatenated. The calls must agree in
    `signature`.
    """
    if len(calls) == 1:
        return calls[0]
    flat, structure = zip(*(pytree.tree_flatten(call.tree) for call in calls), strict=True)
    leaves = [_join(column, calls) for column in zip(*flat, strict=True)]
    return BlockCall.of(pytree.tree_unflatten(leaves, structure[0]), sum(call.batch for call in calls))


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
    leaves, structure = pytree.tree_flatten(call.tree)
    described: list[Any] = []
    for leaf in leaves:
        if _carries_batch(leaf, call.batch):
            described.append((leaf.shape[1:], leaf.dtype))
        else:
            described.append(identity(leaf) if isinstance(leaf, Tensor) else leaf)
    return (hidden_shape[1:], str(structure), *described)
