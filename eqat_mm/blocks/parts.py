"""Batches of all ranks, and this rank's part of each.

Which samples make a batch is decided over the samples of all ranks, so that it does not depend on their number. A rank
computes those that it holds; it may hold none.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from eqat_mm.blocks.calls import BlockCall, digest_of, signature
from eqat_mm.blocks.spool import Stream
from eqat_mm.runtime.ranks import Ranks


@dataclass(frozen=True)
class Sort:
    """What decides with which samples a sample can be batched.

    Attributes:
        tokens: of the sample.
        signature: equal for samples that can be called together.
        weight: how much its tokens count together.
    """

    tokens: int
    signature: Hashable
    weight: float


@dataclass(frozen=True)
class Portion:
    """This rank's part of a batch.

    Attributes:
        ranks: all of them.
        batch: samples of the whole batch, numbered over all ranks.
        mine: those that this rank holds, by their place in its streams.
        tokens: of the parts of all ranks.
        weights: how much the tokens of these parts count.
    """

    ranks: Ranks
    batch: list[int]
    mine: list[int]
    tokens: list[int]
    weights: list[float]

    @classmethod
    def of(cls, batch: list[int], sorts: Sequence[Sort], ranks: Ranks) -> Portion:
        """Return this rank's part of `batch`."""
        tokens, weights = [0] * ranks.world, [0.0] * ranks.world
        for sample in batch:
            tokens[sample % ranks.world] += sorts[sample].tokens
            weights[sample % ranks.world] += sorts[sample].weight
        return cls(ranks, batch, ranks.held(batch), tokens, weights)

    @property
    def share(self) -> float:
        """Share of what the batch's tokens count."""
        return self.weights[self.ranks.rank] / sum(self.weights)

    def joined(self, values: Tensor) -> Tensor:
        """Return the values of all tokens of the batch, of which each rank gives those of its part, one a token."""
        if self.ranks.world == 1:
            return values
        before = sum(self.tokens[: self.ranks.rank])
        whole = torch.zeros(sum(self.tokens), dtype=values.dtype, device=values.device)
        whole[before : before + values.numel()] = values.reshape(-1)
        return self.ranks.sum_(whole)


def sorts_of(
    calls: Sequence[BlockCall], stream: Stream, ranks: Ranks, weights: Sequence[Tensor] | None = None
) -> list[Sort]:
    """Return the sorts of the samples of all ranks, of which this one gives those that it holds.

    `weights` says how much the tokens of these count, [B, T] each; all count 1 without it.
    """
    shapes = [stream.shape_of([index]) for index in range(len(calls))]
    if ranks.world == 1:
        signatures: list[Hashable] = [signature(*pair) for pair in zip(calls, shapes, strict=True)]
    else:
        signatures = _told(calls, shapes)
    tokens = [shape[:2].numel() for shape in shapes]
    counted = tokens if weights is None else [each.sum().item() for each in weights]
    return ranks.all_of([Sort(*each) for each in zip(tokens, signatures, counted, strict=True)])


def _told(calls: Sequence[BlockCall], shapes: Sequence[torch.Size]) -> list[Hashable]:
    """Return signatures that mean the same in every process: tensors count by contents, objects in their order."""
    digests: dict[int, bytes] = {}
    objects: dict[int, int] = {}

    def content(leaf: Any) -> bytes | int:
        if not isinstance(leaf, Tensor):
            return objects.setdefault(id(leaf), len(objects))
        if id(leaf) not in digests:
            digests[id(leaf)] = digest_of(leaf)
        return digests[id(leaf)]

    told = (repr(signature(call, shape, content)) for call, shape in zip(calls, shapes, strict=True))
    return [hashlib.blake2b(text.encode(), digest_size=16).digest() for text in told]
