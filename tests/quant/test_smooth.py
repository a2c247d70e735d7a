"""SmoothQuant: the model computes what it did, and its activations are easier to quantize."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from eqat_mm.errors import AdapterError, ConfigError
from eqat_mm.quant.activations import fake_quantize_symmetric
from eqat_mm.quant.smooth import NormedLinears, fold, smooth, smoothing_factors
from llava_adapters import arch_for
from llava_adapters.registry import known_archs
from tests.checkpoint.files import assert_four_lines
from tests.tiny_model import tiny_llama
from tests.tolerances import assert_close


def with_outliers() -> LlamaForCausalLM:
    """A tiny Llama whose norms give a few channels that are much larger than the others."""
    model = tiny_llama().eval()
    with torch.no_grad():
        for layer in model.model.layers:
            for norm in (layer.input_layernorm, layer.post_attention_layernorm):
                norm.weight[::16] = 40.0
    return model


def batches() -> list[dict[str, Any]]:
    return [{"input_ids": torch.randint(0, 97, (2, 12))} for _ in range(3)]


def logits_of(model: nn.Module, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(input_ids=tokens).logits
    return logits


def test_factors_are_the_formula() -> None:
    range_I, weights = torch.tensor([4.0, 9.0, 1.0]), [torch.tensor([[1.0, -3.0, 0.5], [-4.0, 1.0, 0.25]])]
    wanted = torch.tensor([4**0.5 / 4**0.5, 9**0.5 / 3**0.5, 1 / 0.5**0.5])
    assert_close(smoothing_factors(range_I, weights, 0.5), wanted, "elementwise")
    wanted = torch.tensor([4**0.75 / 4**0.25, 9**0.75 / 3**0.25, 1 / 0.5**0.25])
    assert_close(smoothing_factors(range_I, weights, 0.75), wanted, "elementwise")


def test_weights_of_all_linears_behind_a_norm_count() -> None:
    weights = [torch.full((2, 3), 0.5), torch.full((4, 3), 2.0)]
    assert_close(smoothing_factors(torch.ones(3), weights, 0.0), torch.full((3,), 0.5), "elementwise")


@pytest.mark.parametrize("strength", [0.0, 0.5, 0.85, 1.0])
def test_the_model_computes_what_it_did(strength: float) -> None:
    model, tokens = with_outliers(), torch.randint(0, 97, (2, 12))
    wanted = logits_of(model, tokens)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    places = arch_for("llama").normed_stages(model)
    smooth(model, places, batches(), strength)
    assert_close(logits_of(model, tokens), wanted, "model")
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    norms = ("input_layernorm", "post_attention_layernorm")
    linears = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
    assert changed == {f"model.layers.{k}.{part}.weight" for k in (0, 1) for part in (*norms, *linears)}


@pytest.mark.parametrize("name", sorted(known_archs()))
def test_every_architecture_can_be_smoothed(name: str) -> None:
    arch = known_archs()[name]
    model, inputs = arch.tiny()
    wanted = [logits_of_inputs(model, batch) for batch in inputs]
    smooth(model, arch.normed_stages(model), inputs[-3:], 0.5)
    for batch, expected in zip(inputs, wanted, strict=True):
        assert_close(logits_of_inputs(model, batch), expected, "model")


@torch.no_grad()
def logits_of_inputs(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    logits: Tensor = model(**inputs).logits
    return logits


def test_outliers_cost_less() -> None:
    linear, norm, x = nn.Linear(64, 32), nn.RMSNorm(64), torch.randn(50, 64)
    with torch.no_grad():
        norm.weight[::16] = 40.0
        wanted, before = linear(norm(x)), linear(fake_quantize_symmetric(norm(x), 4))
        place = NormedLinears("norm", norm, [linear])
        fold(place, smoothing_factors(norm(x).abs().amax(0), [linear.weight], 0.5))
        after = linear(fake_quantize_symmetric(norm(x), 4))
    assert (after - wanted).square().mean() < 0.5 * (before - wanted).square().mean()


def test_a_channel_that_is_never_used_stays_finite() -> None:
    factors = smoothing_factors(torch.tensor([0.0, 1.0]), [torch.tensor([[1.0, 0.0]])], 0.5)
    assert factors.isfinite().all()
    assert (factors > 0).all()


@pytest.mark.parametrize("strength", [-0.1, 1.5])
def test_a_strength_outside_its_range_is_refused(strength: float) -> None:
    model = tiny_llama()
    with pytest.raises(ConfigError) as raised:
        smooth(model, arch_for("llama").normed_stages(model), batches(), strength)
    assert_four_lines(raised.value)


class OnePlus(nn.RMSNorm):
    """A norm that multiplies by 1 + weight, as Gemma's does."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.rms_norm(x, self.normalized_shape, 1 + self.weight)


@pytest.mark.parametrize("norm", [nn.LayerNorm(8), nn.RMSNorm(8)], ids=str)
def test_a_norm_with_a_plain_weight_is_taken(norm: nn.Module) -> None:
    model = nn.Sequential(norm, nn.Linear(8, 4))
    x, places = torch.randn(5, 8), places_of(model)
    wanted = model(x)
    smooth(Callable(model), places, [{"x": x}], 0.5)
    assert_close(model(x), wanted, "matmul")


def test_another_norm_is_refused_and_left_alone() -> None:
    model = nn.Sequential(OnePlus(8), nn.Linear(8, 4))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(AdapterError) as raised:
        smooth(Callable(model), places_of(model), [], 0.5)
    assert_four_lines(raised.value)
    assert "OnePlus" in raised.value.where
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class Callable(nn.Module):
    """A sequence that is called like a model."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, use_cache: bool) -> Tensor:
        result: Tensor = self.inner(x)
        return result


def places_of(model: Sequence[nn.Module]) -> list[NormedLinears]:
    linear = model[1]
    assert isinstance(linear, nn.Linear)
    return [NormedLinears("norm", model[0], [linear])]
