"""Batches of streams on their way to the device, and outputs on their way back.

A CUDA device copies from pinned memory seven times as fast as from pageable memory, and beside its other work. There a
thread gathers the next batch into a pinned buffer and sends it while the present batch is computed. Numbers travel in
the stream's dtype; float32 is made of them on the device.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import torch
from torch import Tensor

from eqat_mm.blocks.calls import BlockCall, map_tensors
from eqat_mm.blocks.link import CudaLink, Event, Link
from eqat_mm.blocks.spool import Stream

SLOTS = 2
"""Batches on the device or on their way: one is computed, one is fetched."""

KEPT_BYTES = 1 << 29
"""Recorded tensors that stay on the device. Masks of padded samples may all differ: what is more is sent each time."""

Write = Callable[[Sequence[int], Tensor, Sequence[int]], None]
"""Takes the numbers of samples, their outputs together, and the batch of each."""


class Feed:
    """Moves samples between streams and a device; this one just gathers and writes, as a CPU needs it."""

    def batches(
        self, streams: Sequence[Stream], order: Iterable[list[int]]
    ) -> Iterator[tuple[list[int], tuple[Tensor, ...]]]:
        """Yield the samples of each batch in `order`, and per stream their tensors together, float32 on the device."""
        for indices in order:
            yield indices, tuple(stream.gather(indices).float() for stream in streams)

    @contextmanager
    def results(self, stream: Stream) -> Iterator[Write]:
        """Yield a function that writes outputs of samples to `stream`; at the end all are written."""

        def write(indices: Sequence[int], output: Tensor, sizes: Sequence[int]) -> None:
            for index, part in zip(indices, output.split(list(sizes)), strict=True):
                stream.write(index, part)

        yield write


class _Slot:
    """Memory for one batch on both sides; `used` tells when it may be overwritten."""

    def __init__(self, link: Link, device: torch.device) -> None:
        self.device = device
        self.used = link.event()
        self._buffer = link.buffer
        self._host: list[Tensor] = []
        self._sent: list[Tensor] = []

    def load(self, streams: Sequence[Stream], indices: list[int]) -> list[Tensor]:
        """Gather a batch in pinned memory and begin to send it; return it on the device, in the stream's dtype."""
        views = [self._views(at, stream, indices) for at, stream in enumerate(streams)]
        for stream, (host, sent) in zip(streams, views, strict=True):
            stream.gather(indices, out=host)
            sent.copy_(host, non_blocking=True)
        return [sent for _, sent in views]

    def _views(self, at: int, stream: Stream, indices: list[int]) -> tuple[Tensor, Tensor]:
        shape = stream.shape_of(indices)
        size = shape.numel() * stream.dtype.itemsize
        if at == len(self._host):
            self._host.append(self._buffer(0))
            self._sent.append(torch.empty(0, dtype=torch.uint8, device=self.device))
        if self._host[at].numel() < size:
            self._host[at] = self._buffer(size)
            self._sent[at] = torch.empty(size, dtype=torch.uint8, device=self.device)
        host, sent = (side[at][:size].view(stream.dtype).view(shape) for side in (self._host, self._sent))
        return host, sent


class PinnedFeed(Feed):
    """Fetches a batch, and brings outputs back, while the device computes.

    Buffers grow to the largest batch and are kept. One iteration over `batches` and one `results` may run at a time.
    """

    def __init__(self, device: torch.device, link: Link) -> None:
        self._link = link
        self._slots = [_Slot(link, device) for _ in range(SLOTS)]
        self._back = link.buffer(0)

    def batches(
        self, streams: Sequence[Stream], order: Iterable[list[int]]
    ) -> Iterator[tuple[list[int], tuple[Tensor, ...]]]:
        """As `Feed.batches`; the next batch is fetched when one is taken."""
        remaining = iter(order)
        with ThreadPoolExecutor(1, "eqat-feed") as thread:

            def fetch(number: int) -> tuple[list[int], _Slot, Future[list[Tensor]]] | None:
                indices = next(remaining, None)
                slot = self._slots[number % SLOTS]
                return None if indices is None else (indices, slot, thread.submit(self._load, slot, streams, indices))

            number, ahead = 0, fetch(0)
            while ahead is not None:
                (indices, slot, sent), number = ahead, number + 1
                ahead = fetch(number)
                hidden = tuple(part.to(torch.float32, copy=True) for part in sent.result())
                slot.used.record()
                yield indices, hidden

    @contextmanager
    def results(self, stream: Stream) -> Iterator[Write]:
        """As `Feed.results`; a batch is copied and written while the next one is computed."""
        pending: deque[Future[None]] = deque()
        with ThreadPoolExecutor(1, "eqat-results") as thread:

            def write(indices: Sequence[int], output: Tensor, sizes: Sequence[int]) -> None:
                rounded = output.to(stream.dtype)
                computed = self._link.event()
                computed.record()
                if len(pending) == SLOTS:
                    pending.popleft().result()
                pending.append(thread.submit(self._write, stream, indices, rounded, sizes, computed))

            yield write
            while pending:
                pending.popleft().result()

    def _load(self, slot: _Slot, streams: Sequence[Stream], indices: list[int]) -> list[Tensor]:
        slot.used.synchronize()
        with self._link.copying():
            return slot.load(streams, indices)

    def _write(
        self, stream: Stream, indices: Sequence[int], rounded: Tensor, sizes: Sequence[int], computed: Event
    ) -> None:
        computed.synchronize()
        if self._back.numel() < rounded.nbytes:
            self._back = self._link.buffer(rounded.nbytes)
        host = self._back[: rounded.nbytes].view(rounded.dtype).view(rounded.shape)
        with self._link.copying():
            host.copy_(rounded, non_blocking=True)
        for index, part in zip(indices, host.split(list(sizes)), strict=True):
            stream.write(index, part)


class Copies:
    """Recorded tensors of calls on the device: masks, position ids and rotary tables are sent once, not at each step.

    Args:
        device: where the blocks are computed.
        limit: bytes that are kept.
    """

    def __init__(self, device: torch.device, limit: int = KEPT_BYTES) -> None:
        self.device = device
        self._left = limit
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}  # the recorded one, too: its id must not be given again

    def of(self, call: BlockCall) -> BlockCall:
        """Return the call on the device; equal objects stay equal objects."""
        return call if self.device.type == "cpu" else map_tensors(self._sent, call)

    def _sent(self, recorded: Tensor) -> Tensor:
        if id(recorded) in self._kept:
            return self._kept[id(recorded)][1]
        sent = recorded.to(self.device)
        if sent.nbytes <= self._left:
            self._left -= sent.nbytes
            self._kept[id(recorded)] = (recorded, sent)
        return sent


def feed_for(device: torch.device) -> Feed:
    """Return how samples get to `device` and back."""
    return PinnedFeed(device, CudaLink(device)) if device.type == "cuda" else Feed()
