"""Recorded calls of blocks: trees of tensors and values, which can be joined into one call of several samples."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


@dataclass(frozen=True)
class BlockCall:
    """Everything but the hidden states of one call of one block.

    Attributes:
        args: positional arguments after the hidden states.
        kwargs: keyword arguments.
        batch: size of the batch dimension of the call.
        added: what the model adds to the hidden states before it calls the block, [B, T, H]; None where nothing.
        shared: arguments that hold something which other blocks are given, too; by the names of `shared`.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    batch: int
    added: Tensor | None = None
    shared: frozenset[str] = frozenset()

    @property
    def tree(self) -> tuple[tuple[Any, ...], dict[str, Any], Tensor | None]:
        """All that is recorded, as a tree of tensors and values."""
        return self.args, self.kwargs, self.added

    def over(self, tree: Any, batch: int) -> BlockCall:
        """Return this call with what `tree` gives in place of its own."""
        args, kwargs, added = tree
        return replace(self, args=args, kwargs=kwargs, added=added, batch=batch)


def digest_of(value: Tensor) -> bytes:
    """Return a hash of the contents of a contiguous tensor on the CPU."""
    return hashlib.blake2b(value.view(-1).view(torch.uint8).numpy().data, digest_size=16).digest()


def map_tensors(function: Callable[[Tensor], Tensor], call: BlockCall) -> BlockCall:
    """Return the call with `function` applied to each of its tensors."""
    return call.over(pytree.tree_map_only(Tensor, function, call.tree), call.batch)


def collate(calls: Sequence[BlockCall]) -> BlockCall:
    """Join calls of one block into one call on the concatenation of their batches.

    A leaf that is the same object everywhere and does not carry the batch is kept; tensors with an axis of the
    batch are expanded along it (same object) or concatenated. The calls must agree in
    `signature`: objects that are neither tensors nor values are the same in all of them.
    """
    if len(calls) == 1:
        return calls[0]
    flat, structure = zip(*(pytree.tree_flatten(call.tree) for call in calls), strict=True)
    leaves = [_join(column, calls) for column in zip(*flat, strict=True)]
    return calls[0].over(pytree.tree_unflatten(leaves, structure[0]), sum(call.batch for call in calls))


def _join(column: tuple[Any, ...], calls: Sequence[BlockCall]) -> Any:
    first, axis = column[0], _batch_axis(column[0], calls[0].batch)
    if axis is None:
        return first
    if all(leaf is first for leaf in column) and first.shape[axis] == 1:
        sizes = list(first.shape)
        sizes[axis] = sum(call.batch for call in calls)
        return first.expand(sizes)
    return torch.cat(column, axis)


def _batch_axis(leaf: Any, batch: int) -> int | None:
    """Return the axis of a leaf that is the batch: the first, or of rotary tables in three directions the second."""
    if not isinstance(leaf, Tensor) or leaf.ndim < 2:
        return None
    if leaf.shape[0] == batch:
        return 0
    return 1 if leaf.ndim == 4 and leaf.shape[1] == batch else None


def signature(call: BlockCall, hidden_shape: torch.Size, identity: Callable[[Any], Any] = id) -> tuple[Any, ...]:
    """Return a hashable value; calls with equal signatures can be collated.

    Leaves that carry the batch count by shape and dtype, other tensors and objects by `identity`, the rest by value.
    """
    leaves, structure = pytree.tree_flatten(call.tree)
    described: list[Any] = []
    for leaf in leaves:
        axis = _batch_axis(leaf, call.batch)
        if axis is not None:
            described.append((axis, (*leaf.shape[:axis], *leaf.shape[axis + 1 :]), leaf.dtype))
        else:
            described.append(leaf if _is_value(leaf) else (type(leaf).__name__, identity(leaf)))
    return (hidden_shape[1:], str(structure), *described)


def _is_value(leaf: Any) -> bool:
    """Whether a leaf is equal to others by value; another one may hold anything."""
    hashed: Any = type(leaf).__hash__
    return leaf is None or not (isinstance(leaf, Tensor) or hashed is None or hashed is object.__hash__)
