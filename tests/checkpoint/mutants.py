"""Checkpoints altered at random, and what becomes of them: a model that computes, or an error of the user."""

from __future__ import annotations

import json
import random
import shutil
import struct
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import eqat_mm
from eqat_mm.blocks.source import INDEX
from eqat_mm.checkpoint.manifest import MANIFEST
from eqat_mm.errors import EqatError
from tests.checkpoint.files import assert_four_lines, reseal

NUMBERS = (-1, 0, 1, 2, 3, 7, 31, 32, 33, 63, 64, 65, 97, 128, 10**6, 10**9, 2**31, 2**63, -(10**12), 0.5, -0.0, 1e300)
OTHERS: tuple[Any, ...] = (
    None,
    True,
    False,
    "",
    "x",
    "float16",
    "llama",
    "gelu",
    [],
    [1],
    [[]],
    {},
    {"a": 1},
    float("nan"),
)
OTHERS += (float("inf"), "\udcff", "../x", "x" * 400, [3, 64], [64, 3], [0], "I32", "BF16", "F8_E4M3", "auto")


def mutate(folder: Path, draw: random.Random) -> None:
    """Alter one or a few things in one file of a checkpoint, and mend its hashes most of the time."""
    change = draw.choice(CHANGES)
    for _ in range(draw.choice((1, 1, 1, 2, 4)) if change in _REPEATED else 1):
        change(folder, draw)
    if draw.random() < 0.95 and not change.__name__.endswith("manifest"):
        reseal(folder)


def outcome(folder: Path) -> str:
    """Load and compute; return what happened, `fine` or the kind of the error. Anything but our errors is raised.

    A computation may fail as any on a strange configuration does, but with an exception and not before loading.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = eqat_mm.load(folder)
    except EqatError as error:
        assert_four_lines(error)
        return type(error).__name__
    with torch.no_grad():
        model(input_ids=torch.tensor([[1, 2, 3, 96]]))
    return "fine"


def copy_of(folder: Path, place: Path) -> Path:
    """A fresh copy of a checkpoint."""
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(folder, place)
    return place


def _value(draw: random.Random, old: Any) -> Any:
    if isinstance(old, int) and not isinstance(old, bool) and draw.random() < 0.3:
        return old + draw.choice((-1, 1, 32, -32, old))
    if isinstance(old, list) and draw.random() < 0.4:
        return draw.choice((old[::-1], old[:-1], [*old, 1]))
    return draw.choice((*NUMBERS, *OTHERS))


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) of a nested value."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    return [(value, key) for key in keys] + [place for key in keys for place in _places(value[key])]


def _alter(value: Any, draw: random.Random) -> Any:
    places = _places(value)
    if not places or draw.random() < 0.02:
        return _value(draw, value)
    container, key = draw.choice(places)
    how = draw.random()
    if how < 0.65:
        container[key] = _value(draw, container[key])
    elif how < 0.8:
        del container[key]
    elif isinstance(container, dict):
        container[draw.choice(("x", "num_layers", "auto_map", key + "x"))] = _value(draw, None)
    else:
        container.append(_value(draw, None))
    return value


def _json_of(name: str) -> Callable[[Path, random.Random], None]:
    def change(folder: Path, draw: random.Random) -> None:
        try:
            value = json.loads((folder / name).read_text())
        except ValueError:
            return
        text = json.dumps(_alter(value, draw))
        (folder / name).write_bytes(text.encode("utf-8", "replace"))

    change.__name__ = f"json of {'manifest' if name == MANIFEST else name}"
    return change


def _text_of(name: str) -> Callable[[Path, random.Random], None]:
    def change(folder: Path, draw: random.Random) -> None:
        data = bytearray((folder / name).read_bytes())
        how = draw.randrange(5)
        if how == 0:
            data = data[: draw.randrange(len(data) + 1)]
        elif how == 1:
            data = bytearray(draw.choice((b"[" * 100_000, b'{"a":' * 50_000, b"", b"\xff\xfe", b"9" * 6000, b"null")))
        else:
            for _ in range(draw.choice((1, 3))):
                data[draw.randrange(len(data) or 1) : 1] = b""
                if data:
                    data[draw.randrange(len(data))] = draw.randrange(256)
        (folder / name).write_bytes(bytes(data))

    change.__name__ = f"text of {'manifest' if name == MANIFEST else name}"
    return change


def _header(folder: Path, draw: random.Random) -> None:
    shard = draw.choice(sorted(folder.glob("*.safetensors")))
    data = shard.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    try:
        text = json.dumps(_alter(json.loads(data[8 : 8 + length]), draw)).encode("utf-8", "replace")
    except ValueError:
        return
    shard.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def _shapes(folder: Path, draw: random.Random) -> None:
    """Give a tensor another shape or dtype of as many bytes: what no parser notices."""
    shard = draw.choice(sorted(folder.glob("*.safetensors")))
    data = shard.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    entry = header[draw.choice([name for name in header if name != "__metadata__"])]
    shape = entry["shape"]
    how = draw.randrange(4)
    if how == 0:
        shape.reverse()
    elif how == 1 and shape and shape[0] % 2 == 0:
        entry["shape"] = [shape[0] // 2, 2, *shape[1:]]
    elif how == 2 and len(shape) == 2 and shape[0] % 2 == 0:
        entry["shape"] = [shape[0] // 2, shape[1] * 2]
    else:
        entry["dtype"] = {"I32": "F32", "BF16": "F16", "I64": "F64", "F32": "I32", "F16": "BF16"}.get(
            entry["dtype"], "I8"
        )
    text = json.dumps(header).encode()
    shard.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def _bytes(folder: Path, draw: random.Random) -> None:
    shard = draw.choice(sorted(folder.glob("*.safetensors")))
    data = bytearray(shard.read_bytes())
    for _ in range(draw.choice((1, 20)) if data else 0):
        data[draw.randrange(min(len(data), 4000))] = draw.randrange(256)
    shard.write_bytes(bytes(data[: draw.choice((None, None, -1, -5000, 7, 0))]))


def _names(folder: Path, draw: random.Random) -> None:
    shards = sorted(folder.glob("*.safetensors"))
    left, right = draw.choice(shards), draw.choice(shards)
    first, second = left.read_bytes(), right.read_bytes()
    left.write_bytes(second)
    right.write_bytes(first)
    if draw.random() < 0.5:
        left.unlink()


CHANGES = (
    *(_json_of("config.json"), _json_of("config.json"), _json_of("config.json"), _text_of("config.json")),
    *(_json_of(INDEX), _text_of(INDEX), _json_of(MANIFEST), _json_of(MANIFEST), _text_of(MANIFEST)),
    *(_json_of("generation_config.json"), _text_of("generation_config.json")),
    *(_header, _shapes, _shapes, _bytes, _names),
)
_REPEATED = CHANGES[:-4]
"""Those that may be applied again to what they left."""
