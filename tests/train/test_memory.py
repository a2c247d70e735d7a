"""What `benchmarks/memory_e2e.py` computes: the same as a step that really allocates, and small enough at 7B."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig

from eqat_mm.quant.spec import QuantSpec

GB = 1e9
SMALL = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "vocab_size": 500}


@pytest.fixture(scope="module")
def memory() -> Any:
    """The benchmark as a module."""
    path = Path(__file__).parents[2] / "benchmarks" / "memory_e2e.py"
    spec = importlib.util.spec_from_file_location("memory_e2e", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("bits", [2, 3])
def test_fake_tensors_count_what_a_real_step_allocates(memory: Any, bits: int) -> None:
    config = LlamaConfig(num_hidden_layers=3, **SMALL)
    counted, real = (memory.step_memory(config, QuantSpec(bits, 32), 2, 64, fake=fake) for fake in (True, False))
    assert counted.parts == real.parts
    assert counted.kept == pytest.approx(real.kept, rel=0.03)  # of tensors this small, rotary tables are three percent
    assert counted.peak == pytest.approx(real.peak, rel=0.03)


def test_the_parts_are_those_of_the_format(memory: Any) -> None:
    """Bits per weight, 4 bytes a step size, 8 bytes for its two moments, 2 bytes for what is not quantized."""
    parts = memory.step_memory(LlamaConfig(num_hidden_layers=2, **SMALL), QuantSpec(2, 32), 1, 8).parts
    weights = 2 * (4 * 128 * 128 + 3 * 128 * 256)
    rotary, shapes = 2 * 4 * 16, 2 * 7 * 2 * 8
    assert parts["packed weights"] == weights * 2 // 8 + weights // 32 * 2 // 8 + shapes
    assert parts["step sizes, float32"] == weights // 32 * 4
    assert parts["their two moments in AdamW"] == weights // 32 * 8
    assert parts["embedding, head, norms, bfloat16"] == (2 * 500 * 128 + 5 * 128) * 2 + rotary


def test_a_block_more_keeps_its_input_alone(memory: Any) -> None:
    """bfloat16 hidden states: 2 bytes for each of 2 x 64 x 128."""
    few, more = (
        memory.step_memory(LlamaConfig(num_hidden_layers=blocks, **SMALL), QuantSpec(2, 32), 2, 64).kept
        for blocks in (2, 6)
    )
    assert more - few == pytest.approx(4 * 2 * 64 * 128 * 2, rel=0.1)


def test_7b_fits_a_small_gpu(memory: Any) -> None:
    """2 bits in groups of 64, 2 x 4096 tokens."""
    config = LlamaConfig(vocab_size=32_000, **memory.MODELS["7b"])
    assert memory.step_memory(config, QuantSpec(2, 64), 2, 4096).peak < 9.5 * GB
