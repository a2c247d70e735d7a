"""What is between the host and a device that works beside it: pinned memory, events, copies.

The protocols are what `PinnedFeed` needs, so that its order of events is tested without a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import torch
from torch import Tensor


class Event(Protocol):
    """The part of `torch.cuda.Event` that is needed."""

    def record(self) -> None:
        """Mark what the device was given so far."""

    def synchronize(self) -> None:
        """Wait until the device has done it; at once where nothing was recorded."""


class Link(Protocol):
    """What a `PinnedFeed` needs of a device that works beside the host."""

    def buffer(self, size: int) -> Tensor:
        """Return pinned host memory, uint8 [size]."""

    def event(self) -> Event:
        """Return an event of the stream that computes."""

    def copying(self) -> AbstractContextManager[object]:
        """Return a context whose copies run beside the computation; at its end they are done."""


class CudaLink:
    """The link to a CUDA device: copies have a CUDA stream of their own."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._copies = torch.cuda.Stream(device)

    def buffer(self, size: int) -> Tensor:
        """Return pinned host memory, uint8 [size]."""
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)

    def event(self) -> Event:
        """Return an event of the device's current CUDA stream, whichever device is current."""
        return _CudaEvent(self.device)

    @contextmanager
    def copying(self) -> Iterator[None]:
        """Copy on the CUDA stream for copies; the thread waits for them, the computation does not."""
        with torch.cuda.stream(self._copies):
            yield
            copied = torch.cuda.Event()
            copied.record()
        copied.synchronize()


class _CudaEvent:
    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._event = torch.cuda.Event()

    def record(self) -> None:
        self._event.record(torch.cuda.current_stream(self._device))

    def synchronize(self) -> None:
        self._event.synchronize()
