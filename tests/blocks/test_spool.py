"""Streams hold the same numbers in RAM and on disk, and come back as they were saved."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from eqat_mm.blocks.spool import Stream
from eqat_mm.errors import CheckpointError

DTYPES = [torch.float32, torch.bfloat16]


def samples() -> list[Tensor]:
    """Three samples of different length and batch."""
    return [torch.randn(1, 4, 8), torch.randn(2, 3, 8), torch.randn(1, 4, 8)]


def filled(dtype: torch.dtype, path: Path | None, values: list[Tensor]) -> Stream:
    stream = Stream(dtype, path)
    for value in values:
        stream.append(value)
    stream.seal()
    return stream


def rewrite(stream: Stream, values: list[Tensor], path: Path | None) -> None:
    """Pass a stream on, last sample first."""
    with stream.rewritten(path):
        for index, value in reversed(list(enumerate(values))):
            stream.write(index, value)


@pytest.fixture(params=["ram", "disk"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path | None:
    return None if request.param == "ram" else tmp_path / "spool" / "fp.bin"


@pytest.mark.parametrize("dtype", DTYPES)
def test_samples_are_read_back(path: Path | None, dtype: torch.dtype) -> None:
    values = samples()
    stream = filled(dtype, path, values)
    assert len(stream) == 3
    assert stream.nbytes == sum(value.numel() for value in values) * dtype.itemsize
    for index, value in enumerate(values):
        assert torch.equal(stream.read(index), value.to(dtype))
    assert torch.equal(stream.gather([2, 0]), torch.cat([values[2], values[0]]).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_sample_is_overwritten(path: Path | None, dtype: torch.dtype) -> None:
    values = samples()
    stream = filled(dtype, path, values)
    stream.write(1, torch.ones(2, 3, 8))
    assert torch.equal(stream.read(1), torch.ones(2, 3, 8, dtype=dtype))
    assert torch.equal(stream.read(0), values[0].to(dtype))
    assert torch.equal(stream.read(2), values[2].to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_all_samples_are_rewritten(path: Path | None, tmp_path: Path, dtype: torch.dtype) -> None:
    values, others = samples(), samples()
    stream = filled(dtype, path, values)
    rewrite(stream, others, path and tmp_path / "next.bin")
    assert all(torch.equal(stream.read(index), value.to(dtype)) for index, value in enumerate(others))
    if path is not None:
        assert stream.path == tmp_path / "next.bin"
        before = filled(dtype, None, others)
        before.restore(path)
        assert all(torch.equal(before.read(index), value.to(dtype)) for index, value in enumerate(values))


def test_a_file_is_read_while_the_next_is_written(tmp_path: Path) -> None:
    values = samples()
    stream = filled(torch.float32, tmp_path / "fp.bin", values)
    with stream.rewritten(tmp_path / "next.bin"):
        stream.write(0, torch.zeros(1, 4, 8))
        assert torch.equal(stream.read(0), values[0])
        for index in (1, 2):
            stream.write(index, values[index])
    assert not stream.read(0).any()


def test_a_rewriting_that_fails_leaves_the_stream(tmp_path: Path) -> None:
    values = samples()
    stream = filled(torch.float32, tmp_path / "fp.bin", values)
    with pytest.raises(IndexError), stream.rewritten(tmp_path / "next.bin"):
        stream.write(99, torch.zeros(1, 4, 8))
    assert stream.path == tmp_path / "fp.bin"
    assert all(torch.equal(stream.read(index), value) for index, value in enumerate(values))


def test_a_stream_on_disk_goes_on_from_the_file_it_is_restored_from(tmp_path: Path) -> None:
    values, others = samples(), samples()
    filled(torch.float32, None, others).save(tmp_path / "saved.bin")
    stream = filled(torch.float32, tmp_path / "fp.bin", values)
    stream.restore(tmp_path / "saved.bin")
    assert [path.name for path in tmp_path.iterdir()] == ["saved.bin"]
    stream.save(tmp_path / "saved.bin")  # nothing to be written
    assert all(torch.equal(stream.read(index), value) for index, value in enumerate(others))


def test_a_stream_owns_its_numbers(path: Path | None) -> None:
    values = samples()
    stream = filled(torch.float32, path, values)
    kept = values[0].clone()
    values[0].zero_()
    assert torch.equal(stream.read(0), kept)


def test_non_contiguous_samples(path: Path | None, tmp_path: Path) -> None:
    value = torch.randn(4, 2, 8).transpose(0, 1)
    stream = filled(torch.float32, path, [value])
    assert torch.equal(stream.read(0), value)
    filled(torch.float32, None, [2 * value]).save(tmp_path / "saved.bin")
    stream.restore(tmp_path / "saved.bin")
    assert torch.equal(stream.read(0), 2 * value)


@pytest.mark.parametrize("dtype", DTYPES)
def test_ram_and_disk_save_the_same_bytes(tmp_path: Path, dtype: torch.dtype) -> None:
    values = samples()
    ram, disk = filled(dtype, None, values), filled(dtype, tmp_path / "fp.bin", values)
    ram.save(tmp_path / "ram")
    disk.save(tmp_path / "disk")
    assert (tmp_path / "ram").read_bytes() == (tmp_path / "disk").read_bytes()
    assert (tmp_path / "fp.bin").read_bytes() == (tmp_path / "disk").read_bytes()


@pytest.mark.parametrize("dtype", DTYPES)
def test_saved_samples_are_restored(path: Path | None, tmp_path: Path, dtype: torch.dtype) -> None:
    values = samples()
    stream = filled(dtype, path, values)
    stream.save(tmp_path / "saved.bin")
    for index, value in enumerate(values):
        stream.write(index, torch.zeros_like(value))
    stream.restore(tmp_path / "saved.bin")
    assert all(torch.equal(stream.read(index), value.to(dtype)) for index, value in enumerate(values))
    rewrite(stream, [torch.ones_like(value) for value in values], tmp_path / "next.bin")
    again = filled(dtype, None, [torch.zeros_like(value) for value in values])
    again.restore(tmp_path / "saved.bin")
    assert torch.equal(again.read(0), values[0].to(dtype))


@pytest.mark.parametrize("change", [-1, 1])
def test_a_file_of_another_size_is_refused(path: Path | None, tmp_path: Path, change: int) -> None:
    values = samples()
    stream = filled(torch.float32, path, values)
    saved = tmp_path / "saved.bin"
    saved.write_bytes(bytes(stream.nbytes + change))
    with pytest.raises(CheckpointError) as caught:
        stream.restore(saved)
    assert caught.value.where == str(saved)
    assert caught.value.given == f"{stream.nbytes + change} bytes"
    assert f"{stream.nbytes} bytes" in caught.value.allowed
    assert torch.equal(stream.read(0), values[0])


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="0 bytes"):
        filled(torch.float32, None, samples()).restore(tmp_path / "missing.bin")


def test_a_new_stream_does_not_continue_an_old_file(tmp_path: Path) -> None:
    filled(torch.float32, tmp_path / "fp.bin", samples())
    value = torch.randn(1, 2, 8)
    assert torch.equal(filled(torch.float32, tmp_path / "fp.bin", [value]).read(0), value)
    assert (tmp_path / "fp.bin").stat().st_size == value.numel() * 4
