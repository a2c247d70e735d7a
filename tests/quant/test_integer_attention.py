"""Models whose attention reads a cache of integers: as with the same numbers expanded."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from eqat_kernels import cached_attention as op
from eqat_mm.blocks.attention import new_cache
from eqat_mm.quant import integer_attention
from eqat_mm.quant.kv_cache import QuantizedKVCache
from eqat_mm.train.llm_qat import LLMQATConfig, prepare
from llava_adapters import arch_for
from llava_adapters.tiny import tiny_causal_lm, tiny_llava
from tests.tolerances import assert_close

LANGUAGE = ["llama", "mistral", "qwen2", "qwen3", "granite", "olmo2", "smollm3", "phi3"]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens of the cache in each call of the op."""
    seen: list[int] = []

    def counted(query: Tensor, keys: Tensor, *rest: Any) -> Tensor:
        seen.append(keys.shape[2])
        return op(query, keys, *rest)

    monkeypatch.setattr(integer_attention, "cached_attention", counted)
    return seen


def prepared(name: str, model: nn.Module, bits: int) -> transformers.PreTrainedModel:
    """Return the model with keys and values in integers."""
    prepare(model, arch_for(name), LLMQATConfig(bits=f"8-16-{bits}"))
    assert isinstance(model, transformers.PreTrainedModel)
    return model


def step_by_step(model: nn.Module, batch: dict[str, Tensor], cache: QuantizedKVCache, tokens: Tensor) -> Tensor:
    """Return the logits of a prompt and of further tokens, one at a time."""
    with torch.no_grad():
        found = [model(**batch, past_key_values=cache).logits]
        mask = batch.get("attention_mask")
        for token in tokens.split(1, dim=1):
            if mask is not None:
                mask = torch.cat([mask, torch.ones_like(token)], 1)
            found.append(model(input_ids=token, attention_mask=mask, past_key_values=cache).logits)
    return torch.cat(found, 1)


@pytest.mark.parametrize(("name", "bits"), [("llama", 8), *((name, 4) for name in LANGUAGE)])
def test_logits_are_those_of_expanded_numbers(name: str, bits: int, calls: list[int]) -> None:
    model = prepared(name, tiny_causal_lm(name, pad_token_id=None)[0], bits)
    batch = {"input_ids": torch.randint(5, 90, (2, 9)), "attention_mask": torch.ones(2, 9, dtype=torch.long)}
    batch["attention_mask"][0, :3] = 0  # a shorter prompt, padded
    tokens = torch.randint(5, 90, (2, 4))
    cache = new_cache(model)
    assert cache is not None
    found = step_by_step(model, batch, cache, tokens)
    assert calls == [length for length in range(10, 14) for _ in range(2)]  # not the prompt
    wanted = step_by_step(model, batch, QuantizedKVCache(bits), tokens)
    assert len(calls) == 8
    assert_close(found[:, 3:], wanted[:, 3:], "model")


def test_a_llava_sees_as_before(calls: list[int]) -> None:
    model, batches = tiny_llava("llama")
    batch, tokens = batches[0], torch.randint(5, 90, (len(batches[0]["input_ids"]), 3))
    batch = batch | {"attention_mask": torch.ones_like(batch["input_ids"])}
    prepared("llava", model, 4)
    cache = new_cache(model)
    assert cache is not None
    found = step_by_step(model, batch, cache, tokens)
    assert calls
    assert_close(found, step_by_step(model, batch, QuantizedKVCache(4), tokens), "model")


def test_what_reads_no_integers_is_given_floats() -> None:
    model = prepared("llama", tiny_causal_lm("llama", attn_implementation="eager")[0], 4)
    assert not integer_attention.reads_integers(model)
    cache, states = new_cache(model), torch.randn(1, 2, 3, 16)
    assert cache is not None
    assert cache.update(states, states, 0)[0].dtype is torch.float32


def test_the_name_does_not_travel(tmp_path: Any) -> None:
    model, _ = tiny_causal_lm("llama")
    assert isinstance(model, transformers.PreTrainedModel)
    assert integer_attention.reads_integers(model)
    model.config.save_pretrained(tmp_path)
    assert integer_attention.NAME not in (tmp_path / "config.json").read_text(encoding="utf-8")
