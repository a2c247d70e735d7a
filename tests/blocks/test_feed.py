"""Samples on their way to a device and back. A device that works beside the host is played by one that copies late."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

from eqat_mm.blocks.calls import BlockCall
from eqat_mm.blocks.feed import SLOTS, Copies, Feed, PinnedFeed, feed_for
from eqat_mm.blocks.spool import Stream

CPU = torch.device("cpu")
SHAPES = [(1, 4, 8), (1, 4, 8), (2, 4, 8), (1, 4, 8), (1, 4, 8), (1, 4, 8)]
ORDER = [[3, 0], [1], [2, 4], [5]]


class FakeEvent:
    """Never waits; tells the link when it is asked."""

    def __init__(self, link: FakeLink) -> None:
        self.link = link

    def record(self) -> None:
        self.link.seen.append("record")

    def synchronize(self) -> None:
        self.link.seen.append("synchronize")


class FakeLink:
    """Counts what is asked of it."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.sizes: list[int] = []
        self.threads: set[str] = set()

    def buffer(self, size: int) -> Tensor:
        self.sizes.append(size)
        return torch.empty(size, dtype=torch.uint8)

    def event(self) -> FakeEvent:
        return FakeEvent(self)

    @contextmanager
    def copying(self) -> Iterator[None]:
        self.threads.add(threading.current_thread().name)
        yield


def stream_of(dtype: torch.dtype, path: Path | None = None) -> Stream:
    stream = Stream(dtype, path)
    for shape in SHAPES:
        stream.append(torch.randn(shape))
    stream.seal()
    return stream


@pytest.fixture(params=["gathered", "pinned"])
def feed(request: pytest.FixtureRequest) -> Feed:
    return Feed() if request.param == "gathered" else PinnedFeed(CPU, FakeLink())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_batches_come_in_order_as_float32(feed: Feed, dtype: torch.dtype) -> None:
    left, right = stream_of(dtype), stream_of(torch.float32)
    seen = []
    for indices, (a, b) in feed.batches([left, right], iter(ORDER)):
        assert a.dtype is b.dtype is torch.float32
        assert torch.equal(a, left.gather(indices).float())
        assert torch.equal(b, right.gather(indices))
        seen.append(indices)
    assert seen == ORDER


def test_a_batch_that_is_kept_is_not_overwritten(feed: Feed) -> None:
    stream = stream_of(torch.float32)
    kept = [hidden for _, (hidden,) in feed.batches([stream], ORDER)]
    assert all(torch.equal(hidden, stream.gather(indices)) for hidden, indices in zip(kept, ORDER, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spool", ["ram", "disk"])
def test_results_are_written_where_they_belong(feed: Feed, dtype: torch.dtype, spool: str, tmp_path: Path) -> None:
    stream = stream_of(dtype, None if spool == "ram" else tmp_path / "stream.bin")
    expected = [2 * stream.read(index) for index in range(len(SHAPES))]
    with feed.results(stream) as write:
        for indices, (hidden,) in feed.batches([stream], ORDER):
            write(indices, 2 * hidden, [SHAPES[index][0] for index in indices])
    assert all(torch.equal(stream.read(index), value) for index, value in enumerate(expected))


def test_nothing_to_feed(feed: Feed) -> None:
    assert list(feed.batches([stream_of(torch.float32)], [])) == []


def test_a_feed_goes_on_where_an_iteration_was_left(feed: Feed) -> None:
    stream = stream_of(torch.float32)
    for _ in range(3):
        indices, (hidden,) = next(feed.batches([stream], ORDER))
        assert torch.equal(hidden, stream.gather(indices))


def test_what_goes_wrong_while_fetching_is_raised(feed: Feed) -> None:
    batches = feed.batches([stream_of(torch.float32)], [[0], [99]])
    next(batches)
    with pytest.raises(IndexError):
        next(batches)


def test_what_goes_wrong_while_writing_is_raised(feed: Feed, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError("no space")

    stream = stream_of(torch.float32)
    monkeypatch.setattr(stream, "write", full)
    with pytest.raises(OSError, match="no space"), feed.results(stream) as write:
        write([0], torch.zeros(1, 4, 8), [1])


def test_the_next_batch_is_fetched_while_one_is_computed() -> None:
    stream, fetched = stream_of(torch.float32), threading.Event()
    gather = stream.gather

    def watched(indices: list[int], out: Tensor | None = None) -> Tensor:
        if indices == ORDER[1]:
            fetched.set()
        return gather(indices, out)

    stream.gather = watched  # type: ignore[method-assign, assignment]
    batches = PinnedFeed(CPU, FakeLink()).batches([stream], ORDER)
    next(batches)
    assert fetched.wait(10)


def test_a_slot_is_overwritten_only_when_it_was_used() -> None:
    """The third batch needs the slot of the first: it waits for the event behind the first one's conversion."""
    link = FakeLink()
    released, stream = threading.Event(), stream_of(torch.float32)
    feed = PinnedFeed(CPU, link)
    waits: list[str] = []

    def wait() -> None:
        waits.append("third" if len(waits) else "first")
        if len(waits) > 1:
            released.wait(10)

    feed._slots[0].used.synchronize = wait  # type: ignore[method-assign]
    batches = feed.batches([stream], ORDER)
    first = next(batches)[1][0]
    second = next(batches)[1][0]
    time.sleep(0.05)
    assert waits == ["first", "third"]
    held = feed._slots[0]._sent[0].view(torch.float32)[: first.numel()].view(first.shape)
    assert torch.equal(held, first)  # not overwritten yet
    released.set()
    third = next(batches)[1][0]
    for hidden, indices in zip((first, second, third), ORDER, strict=False):
        assert torch.equal(hidden, stream.gather(indices))


def test_buffers_are_kept_and_grow_to_the_largest_batch() -> None:
    link = FakeLink()
    feed, stream = PinnedFeed(CPU, link), stream_of(torch.bfloat16)
    for _ in range(3):
        with feed.results(stream) as write:
            for indices, (hidden,) in feed.batches([stream], ORDER):
                write(indices, hidden, [SHAPES[index][0] for index in indices])
    largest = 3 * 4 * 8 * 2
    asked = [size for size in link.sizes if size]
    assert max(asked) == largest
    assert len(asked) <= 2 * (SLOTS + 1)
    assert link.threads == {"eqat-feed_0", "eqat-results_0"}
    assert "record" in link.seen


def test_a_cpu_needs_neither_threads_nor_buffers() -> None:
    before = threading.active_count()
    feed = feed_for(CPU)
    assert type(feed) is Feed
    batches = feed.batches([stream_of(torch.float32)], ORDER)
    next(batches)
    assert threading.active_count() == before


# ---- recorded calls -------------------------------------------------------------------------------

META = torch.device("meta")


def test_a_recorded_tensor_is_sent_once() -> None:
    copies, table = Copies(META), torch.ones(4)
    first, second = (copies.of(BlockCall((table,), {"mask": None, "tables": (table,)}, 1)) for _ in range(2))
    assert first.args[0].device == META
    assert first.args[0] is first.kwargs["tables"][0] is second.args[0]
    assert first.kwargs["mask"] is None


def test_more_than_the_limit_is_sent_each_time() -> None:
    copies = Copies(META, limit=20)
    small, large = (BlockCall((torch.ones(size),), {}, 1) for size in (4, 5))
    assert copies.of(large).args[0].nbytes == 20
    assert copies.of(small).args[0] is not copies.of(small).args[0]
    assert copies.of(large).args[0] is copies.of(large).args[0]


def test_calls_on_a_cpu_stay_as_they_are() -> None:
    call = BlockCall((torch.ones(4),), {}, 1)
    assert Copies(CPU).of(call) is call


# ---- a real device --------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_pass_over_a_gpu(dtype: torch.dtype) -> None:
    """Slow kernels between two batches: what comes too early or too late would show."""
    device, stream = torch.device("cuda"), Stream(dtype)
    for _ in range(32):
        stream.append(torch.randn(1, 512, 1024))
    stream.seal()
    expected = [(stream.read(index).float() + 1).to(dtype) for index in range(32)]
    feed, work = feed_for(device), torch.randn(4096, 4096, device=device)
    for indices, (hidden,) in feed.batches([stream], [[i, i + 1] for i in range(0, 32, 2)]):
        work = (work @ work).clamp(-1, 1)
        assert torch.equal(hidden.cpu(), stream.gather(indices).float())
    with feed.results(stream) as write:
        for indices, (hidden,) in feed.batches([stream], [[i, i + 1] for i in range(0, 32, 2)]):
            work = (work @ work).clamp(-1, 1)
            write(indices, hidden + 1 + 0 * work[0, 0], [1, 1])
    assert all(torch.equal(stream.read(index), value) for index, value in enumerate(expected))


@pytest.mark.gpu
def test_a_gpu_gets_pinned_memory() -> None:
    feed, stream = feed_for(torch.device("cuda")), stream_of(torch.bfloat16)
    assert isinstance(feed, PinnedFeed)
    list(feed.batches([stream], ORDER))
    assert all(buffer.is_pinned() for slot in feed._slots for buffer in slot._host)
