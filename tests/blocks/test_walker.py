"""Two streams along the row of blocks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from eqat_mm.blocks import walker as blocks_walker
from eqat_mm.blocks.arch import Inputs
from eqat_mm.blocks.feed import PinnedFeed
from eqat_mm.blocks.source import open_model
from eqat_mm.blocks.walker import BlockWalker, capture_front
from llava_adapters import arch_for
from tests.blocks.test_feed import FakeLink
from tests.tolerances import assert_close

CPU = torch.device("cpu")
LLAMA = arch_for("llama")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model, _ = LLAMA.tiny()
    folder = tmp_path_factory.mktemp("llama")
    model.save_pretrained(folder)  # type: ignore[operator]
    return folder


def batches() -> list[Inputs]:
    """Five samples of two lengths."""
    generator = torch.Generator().manual_seed(3)
    lengths = (7, 5, 7, 5, 7)
    return [{"input_ids": torch.randint(0, 97, (1, length), generator=generator)} for length in lengths]


def walker_of(
    folder: Path,
    *,
    batch_tokens: int = 2048,
    spool: Path | None = None,
    stream_dtype: torch.dtype = torch.float32,
    precision: str = "float32",
) -> BlockWalker:
    opened = open_model(folder, LLAMA)
    return BlockWalker(
        opened,
        capture_front(opened, batches(), torch.float32),
        device=CPU,
        precision=precision,  # type: ignore[arg-type]
        batch_tokens=batch_tokens,
        spool=spool,
        stream_dtype=stream_dtype,
    )


def outputs(walker: BlockWalker) -> list[Tensor]:
    """Pass both streams to the end; return the FP stream."""
    for step in walker.walk():
        walker.advance_fp(step)
        walker.advance_quantized(step)
    return [walker.fp.read(index) for index in range(len(walker.fp))]


def test_batches_of_any_size_give_the_same(folder: Path) -> None:
    alone = outputs(walker_of(folder, batch_tokens=1))
    for batch_tokens in (14, 2048):
        for together, single in zip(outputs(walker_of(folder, batch_tokens=batch_tokens)), alone, strict=True):
            assert_close(together, single, "block")


@pytest.mark.parametrize("stream_dtype", [torch.float32, torch.bfloat16])
def test_streams_in_ram_and_on_disk_are_equal(folder: Path, tmp_path: Path, stream_dtype: torch.dtype) -> None:
    in_ram = outputs(walker_of(folder, stream_dtype=stream_dtype))
    on_disk = outputs(walker_of(folder, stream_dtype=stream_dtype, spool=tmp_path))
    assert all(torch.equal(a, b) for a, b in zip(in_ram, on_disk, strict=True))
    assert in_ram[0].dtype is stream_dtype
    assert {path.name for path in tmp_path.iterdir()} == {"fp-00002.bin", "quantized-00002.bin"}


def test_the_two_streams_are_independent(folder: Path) -> None:
    expected = outputs(walker_of(folder))
    walker = walker_of(folder)
    for step in walker.walk():
        walker.advance_fp(step)
        nn.init.zeros_(step.block.get_parameter("mlp.down_proj.weight"))
        walker.advance_quantized(step)
    for index, value in enumerate(expected):
        assert torch.equal(walker.fp.read(index), value)
        assert not torch.equal(walker.quantized.read(index), value)


def test_a_walk_starts_at_any_block(folder: Path) -> None:
    expected = outputs(walker_of(folder))
    first, second = walker_of(folder), walker_of(folder)
    step = next(iter(first.walk()))
    first.advance_fp(step)
    for index in range(len(first.fp)):
        second.fp.write(index, first.fp.read(index))
    for step in second.walk(start=1):
        assert (step.index, step.name) == (1, "model.layers.1")
        second.advance_fp(step)
    assert all(torch.equal(second.fp.read(index), value) for index, value in enumerate(expected))


def test_a_walk_stops_before_any_block(folder: Path) -> None:
    walker = walker_of(folder)
    assert [step.index for step in walker.walk(stop=1)] == [0]
    assert all(parameter.is_meta for block in walker.opened.blocks for parameter in block.parameters())


@pytest.mark.parametrize("stream_dtype", [torch.float32, torch.bfloat16])
def test_a_pass_measures_its_output(folder: Path, stream_dtype: torch.dtype) -> None:
    walker = walker_of(folder, stream_dtype=stream_dtype)
    for step in walker.walk():
        measured = walker.advance_fp(step)
        squares = [walker.fp.read(index).double().square().mean().item() for index in range(len(walker.fp))]
        assert measured == pytest.approx(sum(squares) / len(squares), rel=1e-5)
        walker.advance_quantized(step)


def test_a_pinned_feed_gives_the_same(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = outputs(walker_of(folder))
    monkeypatch.setattr(blocks_walker, "feed_for", lambda device: PinnedFeed(device, FakeLink()))
    assert all(torch.equal(a, b) for a, b in zip(outputs(walker_of(folder)), expected, strict=True))


def test_files_at_the_input_of_blocks_are_kept_where_asked(folder: Path, tmp_path: Path) -> None:
    opened = open_model(folder, LLAMA)
    captured = capture_front(opened, batches(), torch.float32)
    outputs(BlockWalker(opened, captured, device=CPU, spool=tmp_path, keep_passed=True))
    names = {f"{stream}-{passed:05d}.bin" for stream in ("fp", "quantized") for passed in range(3)}
    assert {path.name for path in tmp_path.iterdir()} == names


def test_blocks_are_frozen_and_in_float32(folder: Path) -> None:
    walker = walker_of(folder)
    assert len(walker) == 2
    for step in walker.walk():
        assert all(parameter.dtype is torch.float32 for parameter in step.block.parameters())
        assert not any(parameter.requires_grad for parameter in step.block.parameters())
        assert not step.block.training


def test_bfloat16_products_stay_close_to_float32(folder: Path) -> None:
    exact = outputs(walker_of(folder))
    rounded = outputs(walker_of(folder, precision="bfloat16"))
    assert rounded[0].dtype is torch.float32
    for value, reference in zip(rounded, exact, strict=True):
        assert not torch.equal(value, reference)
        assert_close(value, reference, "block", torch.bfloat16)


def test_gradients_flow_through_a_replayed_call(folder: Path) -> None:
    walker = walker_of(folder)
    step = next(iter(walker.walk()))
    weight = step.block.get_parameter("mlp.up_proj.weight").requires_grad_()
    output = walker.run(step.block, step.call([0, 2]), step.quantized.gather([0, 2]))
    output.sum().backward()
    assert weight.grad is not None
    assert weight.grad.abs().sum() > 0
