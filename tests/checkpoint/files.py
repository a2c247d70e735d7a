"""Looking at checkpoints as plain files."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from eqat_mm.blocks.source import INDEX
from eqat_mm.checkpoint.manifest import MANIFEST
from eqat_mm.errors import EqatError
from eqat_mm.runtime.files import read_json, sha256_of, write_json
from eqat_mm.runtime.sealed import without_seal, write_sealed


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


def reseal(folder: Path) -> None:
    """Bring the hashes in a manifest up to date, as whoever alters a checkpoint with intent does."""
    manifest = without_seal(read_json(folder / MANIFEST))
    files = {name: sha256_of(folder / name) for name in manifest["files"] if (folder / name).is_file()}
    write_sealed(folder / MANIFEST, manifest | {"files": files})


def alter_manifest(folder: Path, **changes: Any) -> None:
    """Change fields of a manifest, and its own hash."""
    write_sealed(folder / MANIFEST, without_seal(read_json(folder / MANIFEST)) | changes)


def of_version_1(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint as it was before it named more than weight files."""
    manifest = of_version_2(folder) | {"format_version": 1}
    del manifest["auto_class"]
    weights = {name: digest for name, digest in manifest["files"].items() if name.endswith(".safetensors")}
    return manifest | {"files": weights}


def of_version_2(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint as it was before it had its own hash."""
    return without_seal(read_json(folder / MANIFEST)) | {"format_version": 2}


def alter_config(folder: Path, **changes: Any) -> None:
    """Change fields of config.json, and its hash; None takes a field away."""
    config = read_json(folder / "config.json") | changes
    write_json(folder / "config.json", {key: value for key, value in config.items() if value is not None})
    reseal(folder)


def alter_tensors(shard: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    """Change the tensors of a shard, the index and the hashes."""
    save_file(change(load_file(shard)), shard, metadata={"format": "pt"})
    held = {path.name: load_file(path) for path in sorted(shard.parent.glob("*.safetensors"))}
    weight_map = {name: file for file, tensors in held.items() for name in tensors}
    write_json(shard.parent / INDEX, {"metadata": {}, "weight_map": weight_map})
    reseal(shard.parent)


def alter_header(shard: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the header of a shard and leave its numbers as they are; the hashes are brought up to date."""
    data = shard.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    shard.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
    reseal(shard.parent)


def shard_of(folder: Path, name: str) -> Path:
    """The file that holds a tensor."""
    shard: str = read_json(folder / INDEX)["weight_map"][name]
    return folder / shard


def assert_four_lines(error: EqatError) -> None:
    """An error says where, what was given, what is allowed and what to do."""
    lines = str(error).splitlines()
    assert [line.split()[0] for line in lines] == ["where:", "given:", "allowed:", "do:"]
    assert all(len(line.split()) > 1 for line in lines)
