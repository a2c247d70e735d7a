"""Safetensors files as they are written here."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save
from torch import Tensor

from eqat_mm.blocks.source import open_model
from eqat_mm.checkpoint import CheckpointWriter
from eqat_mm.checkpoint.shards import DTYPES, Header, headers_of, save_shard
from eqat_mm.errors import CheckpointError, ConfigError
from eqat_mm.quant.convert import to_fake, to_packed
from eqat_mm.quant.init import initial_grid
from eqat_mm.quant.spec import QuantSpec
from eqat_mm.runtime.files import sha256_of
from eqat_mm.train.rtn import run_rtn
from llava_adapters import arch_for
from tests.checkpoint.conftest import PROVENANCE, save_llama
from tests.checkpoint.files import assert_four_lines


def tensors() -> dict[str, Tensor]:
    """One of every dtype and of some shapes, in no order."""
    found = {f"z{9 - index}.é": torch.ones(3, 2).to(dtype) for index, dtype in enumerate(DTYPES.values())}
    found |= {f"a{index}": torch.ones(5).to(dtype) for index, dtype in enumerate(DTYPES.values())}
    return found | {"scalar": torch.tensor(1.0), "empty": torch.zeros(0, 3), "turned": torch.randn(4, 6).T}


def test_the_bytes_are_the_librarys(tmp_path: Path) -> None:
    digest = save_shard(tmp_path / "a.safetensors", tensors())
    whole = {name: tensor.contiguous() for name, tensor in tensors().items()}
    whole["turned"] = torch.zeros(6, 4)
    save_shard(tmp_path / "b.safetensors", whole)
    assert (tmp_path / "b.safetensors").read_bytes() == save(whole, {"format": "pt"})
    assert digest == sha256_of(tmp_path / "a.safetensors")
    described = {name: Header(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors().items()}
    assert headers_of(tmp_path / "a.safetensors") == described


def test_others_may_read_it(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        save_shard(tmp_path / "a.safetensors", tensors())
    finally:
        os.umask(before)
    assert (tmp_path / "a.safetensors").stat().st_mode & 0o777 == 0o644


KILLED = """
import os, signal, sys, torch
from pathlib import Path
import eqat_mm.checkpoint.shards as shards
inner = shards._chunks
def dying(tensors):
    for index, chunk in enumerate(inner(tensors)):
        if index == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        yield chunk
shards._chunks = dying
shards.save_shard(Path(sys.argv[1]) / "model-00001-of-00003.safetensors", {"a": torch.ones(10), "b": torch.ones(10)})
"""


def test_a_kill_inside_a_write_leaves_nothing_in_the_checkpoint(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    done = subprocess.run([sys.executable, "-c", KILLED, str(folder)], check=False, capture_output=True)
    assert done.returncode == -signal.SIGKILL
    assert [path.suffix for path in folder.iterdir()] == [".partial"]
    save_llama(tmp_path / "full")
    run_rtn(open_model(tmp_path / "full", arch_for("llama")), QuantSpec(), tmp_path, source="tiny", provenance={})
    assert not [path.name for path in folder.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("change", [lambda path: path.unlink(), lambda path: path.write_bytes(path.read_bytes()[:-1])])
def test_a_shard_that_is_lost_before_the_end_is_named(tmp_path: Path, change: object) -> None:
    writer, _ = written(tmp_path)
    change(writer.shard(0))  # type: ignore[operator]
    with pytest.raises(CheckpointError, match="00001-of-00003") as caught:
        writer.finish("x", "tiny", PROVENANCE)
    assert_four_lines(caught.value)


def test_a_shard_that_is_another_one_by_the_end_is_named(tmp_path: Path) -> None:
    writer, digests = written(tmp_path)
    assert digests == {writer.shard(index): sha256_of(writer.shard(index)) for index in range(2)}
    writer.shard(0).write_bytes(writer.shard(1).read_bytes())
    with pytest.raises(CheckpointError, match="as it was written") as caught:
        writer.finish("x", "tiny", PROVENANCE, digests=digests)
    assert_four_lines(caught.value)
    assert caught.value.where == str(writer.shard(0))
    assert not (writer.folder / "eqat.json").exists()


def written(tmp_path: Path) -> tuple[CheckpointWriter, dict[Path, str]]:
    """A checkpoint with all blocks, not finished, and the digests of its shards."""
    save_llama(tmp_path / "full")
    opened = open_model(tmp_path / "full", arch_for("llama"))
    writer = CheckpointWriter(tmp_path / "model", opened, QuantSpec())
    digests = {}
    for index, block in enumerate(opened.blocks):
        opened.source.materialise(block, f"{opened.block_name(index)}.", torch.float32, torch.device("cpu"))
        digests[writer.shard(index)] = writer.write_block(index, block)
    return writer, digests


@pytest.mark.parametrize(("value", "dtype"), [(torch.nan, "bfloat16"), (torch.inf, "bfloat16"), (3e6, "float16")])
def test_step_sizes_that_are_not_finite_are_never_stored(tmp_path: Path, value: float, dtype: str) -> None:
    save_llama(tmp_path / "full")
    opened = open_model(tmp_path / "full", arch_for("llama"))
    spec = QuantSpec(2, 32, scale_dtype=dtype)  # type: ignore[arg-type]
    block, writer = opened.blocks[1], CheckpointWriter(tmp_path / "model", opened, spec)
    opened.source.materialise(block, "model.layers.1.", torch.float32, torch.device("cpu"))
    linear = block.mlp.up_proj
    with torch.no_grad():
        linear.weight[3, 5] = value
    grid = initial_grid(linear.weight, spec, layer="up", init="minmax")
    block.mlp.up_proj = to_packed(to_fake(linear, grid, spec))
    with pytest.raises(ConfigError, match="not finite") as caught:
        writer.write_block(1, block)
    assert_four_lines(caught.value)
    assert caught.value.where == "model.layers.1.mlp.up_proj"
    assert not list((tmp_path / "model").iterdir())


def test_the_source_is_no_place_for_its_checkpoint(tmp_path: Path) -> None:
    save_llama(tmp_path / "model")
    opened = open_model(tmp_path / "model", arch_for("llama"))
    with pytest.raises(ConfigError, match="--output") as caught:
        run_rtn(opened, QuantSpec(), tmp_path, source="tiny", provenance={})
    assert_four_lines(caught.value)
