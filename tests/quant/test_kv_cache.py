"""Keys and values as rows of bytes: what attention reads, what the rows weigh, what generation writes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, LlamaForCausalLM, PreTrainedModel

from eqat_mm.blocks.attention import kv_cache_bits, new_cache, quantize_keys_and_values
from eqat_mm.errors import AdapterError, ConfigError
from eqat_mm.quant.activations import fake_quantize_symmetric
from eqat_mm.quant.kv_cache import (
    SCALE_DTYPE,
    KVQuantizer,
    QuantizedKVCache,
    QuantizedKVLayer,
    cache_bytes,
    pack_rows,
    unpack_rows,
)
from eqat_mm.train.llm_qat import LLMQATConfig, prepare
from llava_adapters import arch_for
from llava_adapters.tiny import tiny_causal_lm
from tests.checkpoint.files import assert_four_lines
from tests.tiny_model import tiny_llama

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def student(bits: int, **changes: Any) -> LlamaForCausalLM:
    """A tiny Llama whose keys and values have `bits` bits."""
    model = tiny_llama(**changes).eval()
    prepare(model, arch_for("llama"), LLMQATConfig(bits=f"8-16-{bits}"))
    return model


# ---- rows ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [4, 8])
def test_rows_hold_what_the_fake_quantizer_gives(bits: int, dtype: torch.dtype) -> None:
    states = (torch.randn(2, 3, 17, 16) * torch.logspace(-4, 4, 17).view(-1, 1)).to(dtype)
    rows = pack_rows(states, bits)
    assert rows.dtype is torch.uint8
    assert rows.shape == (2, 3, 17, 16 * bits // 8 + 2)
    assert torch.equal(unpack_rows(rows, bits, dtype), fake_quantize_symmetric(states, bits, SCALE_DTYPE))


def test_two_codes_share_a_byte() -> None:
    rows = pack_rows(torch.tensor([[7.0, -7.0, 1.0, 2.0]]), 4)
    assert rows[0, :2].tolist() == [15 | 1 << 4, 9 | 10 << 4]
    assert rows[0, 2:].view(SCALE_DTYPE).item() == 1.0


def test_an_odd_number_of_channels_needs_eight_bits() -> None:
    with pytest.raises(ConfigError) as raised:
        pack_rows(torch.randn(1, 1, 2, 5), 4)
    assert_four_lines(raised.value)
    assert pack_rows(torch.randn(1, 1, 2, 5), 8).shape[-1] == 7


@pytest.mark.parametrize("channels", [5, 6])
def test_a_single_row_of_any_length(channels: int) -> None:
    states = torch.randn(1, 1, 1, channels)
    found = unpack_rows(pack_rows(states, 8), 8, torch.float32)
    assert torch.equal(found, fake_quantize_symmetric(states, 8, SCALE_DTYPE))


# ---- cache ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "most"), [(4, 0.30), (8, 0.52)])
def test_what_2048_tokens_weigh(bits: int, most: float) -> None:
    states = torch.randn(1, 3, 2048, 64, dtype=torch.bfloat16)
    plain, quantized = DynamicCache(), QuantizedKVCache(bits)
    for layer in range(2):
        plain.update(states, states, layer)
        quantized.update(states, states, layer)
    assert cache_bytes(plain) == 2 * 2 * states.nbytes
    assert 0.25 < cache_bytes(quantized) / cache_bytes(plain) <= most


@pytest.mark.parametrize("bits", [4, 8])
def test_tokens_may_come_one_by_one(bits: int) -> None:
    keys, values = torch.randn(2, 2, 3, 9, 16)
    at_once, one_by_one = QuantizedKVCache(bits), QuantizedKVCache(bits)
    wanted = at_once.update(keys, values, 0)
    for token in range(9):
        assert one_by_one.get_seq_length() == token
        found = one_by_one.update(keys[..., token : token + 1, :], values[..., token : token + 1, :], 0)
    assert all(torch.equal(left, right) for left, right in zip(found, wanted, strict=True))
    assert torch.equal(wanted[0], fake_quantize_symmetric(keys, bits, SCALE_DTYPE))


def test_sequences_are_reordered_repeated_selected_and_cropped() -> None:
    keys, values = torch.randn(2, 3, 2, 6, 16)
    layer = QuantizedKVLayer(4)
    layer.update(keys, values)
    order = torch.tensor([2, 0, 0])
    layer.reorder_cache(order)
    layer.batch_repeat_interleave(2)
    layer.batch_select_indices(torch.tensor([0, 2]))
    layer.crop(-2)
    found, _ = layer.update(keys[:2, :, :0], values[:2, :, :0])
    assert torch.equal(found, fake_quantize_symmetric(keys[[2, 0], :, :4], 4, SCALE_DTYPE))
    layer.reset()
    assert layer.get_seq_length() == 0


def as_before(rows: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """Unpack by the formula of the rows, in float32."""
    codes = rows[..., :-2]
    if bits == 4:
        codes = torch.stack([codes & 15, codes >> 4], dim=-1).flatten(-2)
    alpha = rows[..., -2:].clone(memory_format=torch.contiguous_format).view(SCALE_DTYPE).float()
    return ((codes.float() - (1 << (bits - 1))) * alpha).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [4, 8])
def test_every_byte_unpacks_by_the_formula(bits: int, dtype: torch.dtype) -> None:
    rows = torch.randint(0, 256, (512, 258), dtype=torch.uint8)
    rows[:, :256] = torch.arange(256, dtype=torch.uint8)
    finite = rows[rows[:, -2:].clone().view(SCALE_DTYPE).float().squeeze(-1).abs() < 1e30]
    assert len(finite) > 256
    assert torch.equal(unpack_rows(finite, bits, dtype), as_before(finite, bits, dtype))
    assert torch.equal(unpack_rows(finite[:, 1::2], bits, dtype), as_before(finite[:, 1::2], bits, dtype))


def test_rows_stay_where_they_are_while_tokens_are_appended() -> None:
    cache, states = QuantizedKVCache(4), torch.randn(2, 3, 700, 16)
    cache.update(states[..., :1, :], states[..., :1, :], 0)
    addresses = set()
    for token in range(1, 700):
        before = cache.layers[0].keys
        assert before is not None
        kept = before.clone()
        cache.update(states[..., token : token + 1, :], states[..., token : token + 1, :], 0)
        assert torch.equal(before, kept)
        addresses.add(cache.layers[0].keys.data_ptr())  # type: ignore[union-attr]
    assert len(addresses) < 10
    assert torch.equal(cache.layers[0].keys, pack_rows(states, 4))  # type: ignore[union-attr, arg-type]
    assert cache_bytes(cache) == 2 * pack_rows(states, 4).nbytes


@pytest.mark.parametrize("change", ["crop", "reorder", "reset"])
def test_what_was_read_before_a_change_stays_as_it_was(change: str) -> None:
    layer, states = QuantizedKVLayer(4), torch.randn(2, 3, 5, 16)
    layer.update(states, states)
    old = layer.keys
    kept = old.clone()
    {
        "crop": lambda: layer.crop(-2),
        "reorder": lambda: layer.reorder_cache(torch.tensor([1, 0])),
        "reset": layer.reset,
    }[change]()
    found, _ = layer.update(states[..., :2, :], states[..., :2, :])
    assert torch.equal(old, kept)
    first = {"crop": states[..., :3, :], "reorder": states[[1, 0]], "reset": states[..., :0, :]}[change]
    wanted = torch.cat([first, states[..., :2, :]], dim=-2)
    assert torch.equal(found, fake_quantize_symmetric(wanted, 4, SCALE_DTYPE))


def test_a_cache_filled_in_inference_mode_goes_on_outside_and_a_copy_on_its_own() -> None:
    cache, states = QuantizedKVCache(4), torch.randn(1, 2, 6, 16)
    with torch.inference_mode():
        cache.update(states[..., :3, :], states[..., :3, :], 0)
    cache.update(states[..., 3:4, :], states[..., 3:4, :], 0)
    twin = copy.deepcopy(cache)
    for one in (twin, cache):
        found, _ = one.update(states[..., 4:, :], states[..., 4:, :], 0)
        assert torch.equal(found, fake_quantize_symmetric(states, 4, SCALE_DTYPE))
    twin.update(-states, -states, 0)
    assert torch.equal(cache.layers[0].keys, pack_rows(states, 4))  # type: ignore[union-attr, arg-type]


# ---- models --------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [4, 8])
def test_a_cache_of_integers_equals_fake_quantization(bits: int) -> None:
    model, tokens = student(bits), torch.randint(0, 97, (2, 12))
    cache = new_cache(model)
    assert cache is not None
    with torch.no_grad():
        wanted = model(tokens, use_cache=False).logits
        floats = model(tokens, past_key_values=DynamicCache(config=model.config)).logits
        integers = model(tokens, past_key_values=cache).logits
    assert torch.equal(floats, wanted)
    assert torch.equal(integers, wanted)
    assert all(layer.keys.dtype is torch.uint8 for layer in cache.layers)  # type: ignore[union-attr]


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True}], ids=str)
@pytest.mark.parametrize("bits", [4, 8])
def test_generate_takes_the_cache(bits: int, options: dict[str, Any]) -> None:
    model, tokens = student(bits), torch.randint(0, 97, (2, 5))
    settings = {"max_new_tokens": 12, "pad_token_id": 0, "attention_mask": torch.ones_like(tokens)} | options
    texts, caches = [], [None, new_cache(model)]
    for cache in caches:
        torch.manual_seed(1)
        texts.append(model.generate(tokens, past_key_values=cache, **settings))  # type: ignore[operator]
    assert texts[0].shape[1] > 5
    assert torch.equal(*texts)
    assert caches[1] is not None
    assert caches[1].get_seq_length() > 5


def test_padded_prompts_generate_alike() -> None:
    model, tokens = student(4), torch.randint(0, 97, (2, 6))
    mask = torch.ones_like(tokens)
    mask[0, :3] = 0
    texts = [
        model.generate(tokens, attention_mask=mask, max_new_tokens=8, pad_token_id=0, past_key_values=cache)  # type: ignore[operator]
        for cache in (None, new_cache(model))
    ]
    assert torch.equal(*texts)


def test_sliding_windows_see_what_they_should() -> None:
    model, _ = tiny_causal_lm("mistral", sliding_window=4, initializer_range=0.2)
    assert isinstance(model, PreTrainedModel)
    prepare(model, arch_for("mistral"), LLMQATConfig(bits="8-16-4"))
    tokens = torch.randint(0, 97, (2, 12))
    with torch.no_grad():
        wanted = model(tokens, use_cache=False).logits
        cache = new_cache(model)
        parts = [model(part, past_key_values=cache).logits for part in tokens.split(3, dim=1)]
    assert torch.allclose(torch.cat(parts, 1), wanted, atol=1e-5)


def test_a_cache_of_other_bits_is_only_a_cache() -> None:
    model, tokens = student(4), torch.randint(0, 97, (1, 8))
    with torch.no_grad():
        wanted = model(tokens, use_cache=False).logits
        found = model(tokens, past_key_values=QuantizedKVCache(8)).logits
    assert 0 < (found - wanted).abs().mean() < 0.1 * wanted.abs().mean()


def test_keys_and_values_are_trained_straight_through() -> None:
    model, tokens = student(4), torch.randint(0, 97, (2, 12))
    model.train().requires_grad_(True)
    grads: list[dict[str, Tensor]] = []
    for checkpointing in (False, True):
        model.zero_grad()
        if checkpointing:
            model.activation_checkpointing_enable()  # type: ignore[operator]
        model(tokens, labels=tokens, use_cache=False).loss.backward()
        grads.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert len(grads[0]) == len(list(model.parameters()))
    assert grads[0].keys() == grads[1].keys()
    assert all(torch.equal(grads[0][name], grads[1][name]) for name in grads[0])
    assert grads[0]["model.layers.0.self_attn.k_proj.weight"].any()


def test_what_is_quantized_can_be_asked() -> None:
    assert kv_cache_bits(student(4)) == 4
    plain = student(16)
    assert kv_cache_bits(plain) == 16
    assert new_cache(plain) is None
    assert not any(isinstance(module, KVQuantizer) for module in plain.modules())


def test_a_copied_model_quantizes_with_its_own_modules() -> None:
    model, tokens = student(4), torch.randint(0, 97, (1, 8))
    twin = copy.deepcopy(model)
    with torch.no_grad():
        assert torch.equal(twin(tokens).logits, model(tokens).logits)
    assert len([module for module in twin.modules() if isinstance(module, KVQuantizer)]) == 2


def test_a_model_without_quantized_linears_has_no_attention_to_quantize() -> None:
    with pytest.raises(AdapterError) as raised:
        quantize_keys_and_values(tiny_llama(), 4)
    assert_four_lines(raised.value)
