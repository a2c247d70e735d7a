"""The walker carries two streams of activations along the row of blocks.

The FP stream passes the full-precision blocks and gives the targets; the quantized stream passes the blocks that
are already quantized and gives the inputs, so a block can mend the errors of those before it. One block is in
memory at a time. The walker knows no architecture and never calls anything but the blocks themselves.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import repeat
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from eqat_mm.blocks.arch import Inputs, Part
from eqat_mm.blocks.calls import BlockCall, collate, map_tensors
from eqat_mm.blocks.capture import CapturedSample, capture
from eqat_mm.blocks.feed import Copies, feed_for
from eqat_mm.blocks.parts import Portion, Sort, sorts_of
from eqat_mm.blocks.shared import changed_objects, changes_shared, look_at, named_arguments
from eqat_mm.blocks.source import OpenModel, release
from eqat_mm.blocks.spool import FP, QUANTIZED, Stream, stream_path
from eqat_mm.blocks.weights import stand_in
from eqat_mm.runtime.precision import autocast
from eqat_mm.runtime.ranks import ALONE, Ranks


@dataclass(frozen=True)
class BlockStep:
    """One block whose turn it is.

    Attributes:
        index: position in the row.
        name: full path in the model.
        block: its module; full precision when the step begins, packed when it ends.
        fp: the FP stream; at the block's input until `BlockWalker.advance_fp`, then at its output (the targets).
        quantized: the quantized stream, at the block's input until `BlockWalker.advance_quantized`.
        calls: how the model calls the block, one per sample.
        copies: what calls hold, on the device.
        ranks: those that share the samples; streams and calls are of the samples that this one holds.
        weights: how much tokens count, [B, T] for each sample that this rank holds; None where all count alike.
        sorts: what decides with which others a sample is batched, for each sample of all ranks.
    """

    index: int
    name: str
    block: nn.Module
    fp: Stream
    quantized: Stream
    calls: tuple[BlockCall, ...]
    copies: Copies = field(default_factory=lambda: Copies(torch.device("cpu")))
    ranks: Ranks = ALONE
    weights: Sequence[Tensor] | None = None
    sorts: list[Sort] = field(init=False)

    def __post_init__(self) -> None:
        """Learn from all ranks, each of which makes this step, what decides about batches."""
        object.__setattr__(self, "sorts", sorts_of(self.calls, self.quantized, self.ranks, self.weights))

    def call(self, mine: Sequence[int]) -> BlockCall:
        """Return the call for some of this rank's samples together, on the device."""
        return collate([self.copies.of(self.calls[i]) for i in mine])

    def weights_of(self, mine: Sequence[int]) -> Tensor | None:
        """Return how much the tokens of some of this rank's samples count, [B, T] on the device."""
        return None if self.weights is None else torch.cat([self.weights[i] for i in mine]).to(self.copies.device)

    def buckets(self, samples: Sequence[int]) -> list[list[int]]:
        """Group samples of all ranks that can be batched together, keeping their order."""
        groups: dict[object, list[int]] = defaultdict(list)
        for sample in samples:
            groups[self.sorts[sample].signature].append(sample)
        return list(groups.values())

    def batches(self, samples: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
        """Yield samples of all ranks in batches of about `batch_tokens` tokens that can be called together."""
        for bucket in self.buckets(samples):
            size = max(1, batch_tokens // self.sorts[bucket[0]].tokens)
            for at in range(0, len(bucket), size):
                yield bucket[at : at + size]


class BlockWalker:
    """Walks the blocks of an opened model.

    Args:
        opened: the model.
        samples: captured forwards; their hidden states go into the streams as they come.
        device: where blocks are computed.
        precision: `float32`, or `bfloat16` for matrix products under autocast; weights are held in float32.
        stream_dtype: in which activations are kept.
        spool: folder for memory-mapped streams, each in a file of its own behind each block; None keeps them in RAM.
        keep_passed: leave the file at a block's input when the stream has passed it; a commit removes it.
        batch_tokens: tokens per forward when a stream is advanced.
        ranks: processes that walk together; `samples` are those that this one holds (`Ranks.share`).
        weights: from the number of a block to how much the tokens of each sample count there, [B, T]; asked when all
            samples have been captured. None: all count alike.
    """

    def __init__(
        self,
        opened: OpenModel,
        samples: Iterable[CapturedSample],
        *,
        device: torch.device,
        precision: Literal["float32", "bfloat16"] = "float32",
        stream_dtype: torch.dtype = torch.float32,
        spool: Path | None = None,
        keep_passed: bool = False,
        batch_tokens: int = 2048,
        ranks: Ranks = ALONE,
        weights: Callable[[int], Sequence[Tensor]] | None = None,
    ) -> None:
        self.opened = opened
        self.device = device
        self.precision = precision
        self.batch_tokens = batch_tokens
        self.ranks = ranks
        self.feed = feed_for(device)
        self._blocks = opened.blocks
        self._copies = Copies(device)
        self._weights = weights
        self._spool, self._keep_passed = spool, keep_passed
        self.fp = Stream(stream_dtype, self._path(FP, 0))
        self.quantized = Stream(stream_dtype, self._path(QUANTIZED, 0))
        per_sample = []
        for sample in samples:
            self.fp.append(sample.hidden)
            per_sample.append(sample.calls)
        self.fp.seal()
        for index in range(len(self.fp)):  # only now, when what stands before the blocks may be freed again
            self.quantized.append(self.fp.read(index))
        self.quantized.seal()
        self._calls = list(zip(*per_sample, strict=True))

    def __len__(self) -> int:
        return len(self._blocks)

    def walk(self, start: int = 0, stop: int | None = None) -> Iterator[BlockStep]:
        """Yield the full-precision blocks from `start` up to `stop`; both streams must stand at that block's input.

        The caller passes both streams through the block, with `advance_fp` before it is changed and with
        `advance_quantized` after; then it is freed.
        """
        for index in range(start, len(self) if stop is None else stop):
            block = self.load_block(index)
            name = self.opened.block_name(index)
            carried = (self.fp, self.quantized, self._calls[index], self._copies, self.ranks)
            yield BlockStep(index, name, block, *carried, None if self._weights is None else self._weights(index))
            block.to("meta")

    def load_block(self, index: int) -> nn.Module:
        """Read block `index` from the checkpoint, full precision, frozen."""
        block = self._blocks[index]
        self.opened.source.materialise(block, self.opened.block_name(index) + ".", torch.float32, self.device)
        return block.requires_grad_(False)

    def advance_fp(self, step: BlockStep) -> float:
        """Pass the FP stream through the block of `step`; return the mean square of its output, over all ranks."""
        return self._pass(step, self.fp, FP)

    def advance_quantized(self, step: BlockStep) -> None:
        """Pass the quantized stream through the block of `step`."""
        self._pass(step, self.quantized, QUANTIZED)

    def run(self, block: nn.Module, call: BlockCall, hidden: Tensor) -> Tensor:
        """Return the output [B, T, H] of `block` for a recorded call, on the walker's device and in its precision.

        Raises:
            AdapterError: it changes an object that other blocks are given, too.
        """
        call = map_tensors(lambda recorded: recorded.to(self.device), call)
        hidden = hidden.to(self.device).float()
        if call.added is not None:
            hidden = hidden + call.added
        given = named_arguments(call.args, call.kwargs)
        looked_at = look_at({name: given[name] for name in call.shared})
        with autocast(self.precision, self.device):
            output = block(hidden, *call.args, **call.kwargs)
        for argument, value in changed_objects(looked_at):
            raise changes_shared(block, "a decoder block", argument, value)
        hidden_states: Tensor = output[0] if isinstance(output, tuple) else output
        return hidden_states

    def parts(
        self, step: BlockStep, streams: Sequence[Stream], order: Iterable[list[int]]
    ) -> Iterator[tuple[Portion, tuple[Tensor, ...]]]:
        """Yield this rank's part of each batch, and per stream its samples together, float32 on the device.

        Where it has none of a batch, tensors of no element stand for them.
        """
        parts = [Portion.of(batch, step.sorts, self.ranks) for batch in order]
        fed = self.feed.batches(streams, [part.mine for part in parts if part.mine])
        nothing = (torch.empty(0, 1, 1, device=self.device),) * len(streams)
        for part in parts:
            yield part, next(fed)[1] if part.mine else nothing

    @torch.no_grad()
    def _pass(self, step: BlockStep, stream: Stream, name: str) -> float:
        """Overwrite every sample with its output; return the mean over samples of its tokens' mean square."""
        squares = torch.zeros(len(step.calls), device=self.device)  # small tensors would lie between freed large ones
        passed = stream.path
        with stream.rewritten(self._path(name, step.index + 1)), self.feed.results(stream) as write:
            order = step.batches(self.ranks.share(len(step.sorts)), self.batch_tokens)
            for part, (hidden,) in self.parts(step, [stream], order):
                output = self.run(step.block, step.call(part.mine), hidden).to(stream.dtype)
                sizes = [step.calls[i].batch for i in part.mine]
                write(part.mine, output, sizes)
                counts = None if step.weights is None else [step.weights[i].to(output.device) for i in part.mine]
                means = map(_mean_square, output.split(sizes), counts or repeat(None))
                for index, mean in zip(part.mine, means, strict=True):
                    squares[index] = mean
        if passed is not None and not self._keep_passed:
            passed.unlink()
        return self.ranks.mean(squares)

    def _path(self, name: str, passed: int) -> Path | None:
        return None if self._spool is None else stream_path(self._spool, name, passed)


def capture_front(opened: OpenModel, batches: Iterable[Inputs], dtype: torch.dtype) -> Iterator[CapturedSample]:
    """Capture the calls of every batch; what stands before the blocks is read when a forward first comes to it.

    A part that no batch passes through is therefore never read: the output head, and the vision tower where all
    batches are text. On the CPU; freed at the end.
    """
    with _read_when_called(opened, dtype):
        yield from capture(opened.model, opened.blocks, batches)


@contextmanager
def _read_when_called(opened: OpenModel, dtype: torch.dtype) -> Iterator[None]:
    """Read a part when it is first called; until then, and for the blocks, numbers stand in that take no memory.

    Models look at parameters before they call what holds them, at their device and dtype above all.
    """
    stand_in(opened.model, dtype)
    handles = []
    for part in opened.arch.full_precision_parts(opened.model):
        handles.append(part.module.register_forward_pre_hook(_reader(opened, part, dtype)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        release(opened.model)


def _reader(opened: OpenModel, part: Part, dtype: torch.dtype) -> Callable[[nn.Module, Any], None]:
    prefix, unread = f"{part.path}." if part.path else "", [part]

    def read(module: nn.Module, _: Any) -> None:
        if unread:
            unread.clear()
            release(module, recurse=part.whole)
            opened.source.materialise(module, prefix, dtype, torch.device("cpu"), recurse=part.whole)

    return read


def _mean_square(value: Tensor, weights: Tensor | None) -> Tensor:
    """Return the mean square of tokens [B, T, H] that count as `weights` [B, T] say; without a squared copy."""
    if weights is None:
        square: Tensor = torch.linalg.vector_norm(value, dtype=torch.float32).square() / value.numel()
        return square
    rows: Tensor = torch.linalg.vector_norm(value, dim=-1, dtype=torch.float32).square() / value.shape[-1]
    return (rows * weights).sum() / weights.sum()
