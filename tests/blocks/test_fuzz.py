"""Whatever stands in the files of a model folder, opening it succeeds or ends with an error of ours."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from eqat_mm.blocks.config import CONFIG, GENERATION_CONFIG
from eqat_mm.blocks.source import INDEX, open_model
from eqat_mm.checkpoint.folders import load_for_inference, load_tokenizer
from eqat_mm.errors import EqatError
from llava_adapters import arch_of_folder
from tests.tiny_llava import save_tiny_llava
from tests.tiny_model import tiny_llama, word_tokenizer

CASES = settings(
    max_examples=int(os.environ.get("EQAT_FUZZ_EXAMPLES", "25")),
    deadline=None,
    derandomize="EQAT_FUZZ_EXAMPLES" not in os.environ,
    suppress_health_check=list(HealthCheck),
)

JSON_FILES = (CONFIG, CONFIG, INDEX, GENERATION_CONFIG, "tokenizer_config.json")
NUMBERS = st.one_of(st.integers(-2, 200), st.sampled_from([2**31, 2**63, 10**30, -(10**12)]), st.floats())
SCALARS = st.one_of(
    st.none(), st.booleans(), NUMBERS, st.text(max_size=8), st.sampled_from(["llama", "float7", "gelu"])
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


@pytest.fixture(scope="module", params=["llama", "llava"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model in shards, with everything that can lie beside it."""
    made = tmp_path_factory.mktemp("fuzzed")
    if request.param == "llava":
        save_tiny_llava(made)
        return made
    tiny_llama(eos_token_id=1).save_pretrained(made, max_shard_size="100KB")
    word_tokenizer().save_pretrained(made)
    return made


@contextmanager
def altered(file: Path, content: bytes) -> Iterator[None]:
    before = file.read_bytes()
    file.write_bytes(content)
    try:
        yield
    finally:
        file.write_bytes(before)


def opened(folder: Path) -> None:
    """Open what a folder holds, in every way."""
    with suppress(EqatError):
        load_for_inference(folder, torch.device("cpu"))
    with suppress(EqatError):
        open_model(folder, arch_of_folder(folder))
    with suppress(EqatError):
        load_tokenizer(folder)


@CASES
@given(data=st.data())
def test_altered_json(folder: Path, data: st.DataObject) -> None:
    file = folder / data.draw(st.sampled_from([name for name in JSON_FILES if (folder / name).is_file()]))
    content = json.loads(file.read_text(encoding="utf-8"))
    for _ in range(data.draw(st.integers(1, 2))):
        _alter(content, data)
    with altered(file, json.dumps(content).encode()):
        opened(folder)


def _alter(part: Any, data: st.DataObject) -> None:
    """Remove or replace one value, somewhere in it."""
    keys = sorted(part) if isinstance(part, dict) else list(range(len(part)))
    if not keys:
        return
    key = data.draw(st.sampled_from(keys))
    if isinstance(part[key], dict | list) and data.draw(st.booleans()):
        _alter(part[key], data)
    elif isinstance(part, dict) and data.draw(st.integers(0, 3)) == 0:
        del part[key]
    else:
        part[key] = data.draw(VALUES)


@CASES
@given(data=st.data())
def test_altered_bytes(folder: Path, data: st.DataObject) -> None:
    files = sorted(path for path in folder.iterdir() if path.suffix in (".json", ".safetensors"))
    file = data.draw(st.sampled_from(files))
    content = bytearray(file.read_bytes())
    end = min(len(content), 2000)
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, end - 1))
        content[place : place + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    with altered(file, bytes(content)):
        opened(folder)
