"""Looking at checkpoints as plain files."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from eqat_mm.blocks.source import INDEX
from eqat_mm.errors import EqatError
from eqat_mm.runtime.files import read_json


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """Every tensor in the shards of a folder."""
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def same_bytes(left: Tensor, right: Tensor) -> bool:
    """Whether two tensors have one dtype, shape and contents, bit for bit."""
    as_bytes = (tensor.contiguous().view(-1).view(torch.uint8) for tensor in (left, right))
    return left.dtype is right.dtype and left.shape == right.shape and torch.equal(*as_bytes)


def same_weights(left: Path, right: Path) -> bool:
    """Whether two checkpoints hold the same tensors, bit for bit."""
    a, b = tensors_of(left), tensors_of(right)
    assert a.keys() == b.keys()
    return all(same_bytes(a[name], b[name]) for name in a)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder by its path in it."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def shard_of(folder: Path, name: str) -> Path:
    """The file that holds a tensor."""
    shard: str = read_json(folder / INDEX)["weight_map"][name]
    return folder / shard


def assert_four_lines(error: EqatError) -> None:
    """An error says where, what was given, what is allowed and what to do."""
    lines = str(error).splitlines()
    assert [line.split()[0] for line in lines] == ["where:", "given:", "allowed:", "do:"]
    assert all(len(line.split()) > 1 for line in lines)
