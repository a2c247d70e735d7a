"""Whole models under torch.compile, in one graph: what they say and what their step sizes learn is the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import StaticCache

from eqat_mm.quant import PackedLinear, QuantSpec
from eqat_mm.quant.convert import to_dynamic_packed, to_fake
from eqat_mm.quant.dynamic_linear import DynamicFakeLinear
from eqat_mm.quant.init import initial_grid
from eqat_mm.train.llm_qat import LLMQATConfig, prepare
from llava_adapters import arch_for
from tests.tiny_model import tiny_llama
from tests.tolerances import assert_close


def packed_llama(bits: int, **changes: Any) -> nn.Module:
    """A tiny Llama on random packed weights."""
    model, spec = tiny_llama(**changes).eval(), QuantSpec(bits, 32)
    for name, linear in list(model.model.named_modules()):
        if isinstance(linear, nn.Linear):
            model.model.set_submodule(name, random_packed(linear, spec))
    return model.requires_grad_(True)


def random_packed(linear: nn.Linear, spec: QuantSpec) -> PackedLinear:
    codes = torch.randint(0, spec.top + 1, linear.weight.shape, dtype=torch.uint8)
    groups = linear.weight.shape[0], linear.weight.shape[1] // spec.group_size
    scale, zero = torch.rand(groups) / spec.top, torch.randint(0, spec.top + 1, groups).float()
    return PackedLinear.from_codes(codes, scale, zero, None, spec)


def llm_qat_model(bits: str) -> nn.Module:
    """A tiny Llama with quantized activations, and keys and values."""
    model = tiny_llama().eval()
    prepare(model, arch_for("llama"), LLMQATConfig(bits=bits))
    for name, linear in list(model.named_modules()):
        if isinstance(linear, DynamicFakeLinear):
            model.set_submodule(name, to_dynamic_packed(linear))
    return model


def fake_quant_llama() -> nn.Module:
    """A tiny Llama in training, 2 bits."""
    model, spec = tiny_llama().eval(), QuantSpec(2, 32)
    for name, linear in list(model.model.named_modules()):
        if isinstance(linear, nn.Linear):
            model.model.set_submodule(name, fake_twin(linear, name, spec))
    return model


def fake_twin(linear: nn.Linear, name: str, spec: QuantSpec) -> nn.Module:
    return to_fake(linear, initial_grid(linear.weight.detach(), spec, layer=name, init="minmax"), spec)


def logits_and_gradients(model: nn.Module, run: Any, tokens: Tensor) -> list[Tensor]:
    model.zero_grad()
    logits: Tensor = run(input_ids=tokens, use_cache=False).logits
    logits.square().mean().backward()
    return [logits, *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize(
    "make",
    [
        lambda: packed_llama(2),
        lambda: packed_llama(3),
        lambda: llm_qat_model("4-8-16"),
        lambda: llm_qat_model("4-8-4"),
        fake_quant_llama,
    ],
    ids=["2", "3", "4-8-16", "4-8-4", "in training"],
)
def test_a_model_compiles_in_one_graph(make: Any) -> None:
    torch.compiler.reset()
    model, tokens = make(), torch.randint(0, 97, (2, 7))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    found, wanted = (logits_and_gradients(model, run, tokens) for run in (compiled, model))
    assert len(found) == len(wanted) > 1
    for value, expected in zip(found, wanted, strict=True):
        assert_close(value, expected, "model")


def test_a_step_with_a_static_cache_compiles_in_one_graph() -> None:
    torch.compiler.reset()
    model, tokens = packed_llama(2), torch.randint(0, 97, (2, 7))
    compiled, found = torch.compile(model, fullgraph=True, backend="aot_eager"), []
    for run in (compiled, model):
        cache = StaticCache(model.config, max_cache_len=8)  # type: ignore[arg-type]
        with torch.no_grad():
            model(tokens[:, :6], past_key_values=cache, use_cache=True)
            found.append(run(input_ids=tokens[:, 6:], past_key_values=cache, use_cache=True).logits)
    assert_close(found[0], found[1], "model")
