"""Checkpoints with quantized activations and KV cache: what is on disk, what we read, what others read and apply."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from compressed_tensors.quantization import QuantizationConfig
from torch import Tensor

import eqat_mm
from eqat_kernels import unpack
from eqat_mm.blocks.arch import set_submodule
from eqat_mm.blocks.attention import kv_cache_bits
from eqat_mm.blocks.source import open_model
from eqat_mm.checkpoint import read_manifest, save_like
from eqat_mm.checkpoint.layout import BYTES, PACKED, from_bytes, to_bytes
from eqat_mm.checkpoint.manifest import MANIFEST
from eqat_mm.commands.verbs.evaluate import bits_per_weight
from eqat_mm.errors import CheckpointError
from eqat_mm.quant.bit_widths import BitWidths
from eqat_mm.quant.dynamic_linear import DynamicPackedLinear
from eqat_mm.runtime.files import read_json
from eqat_mm.train.llm_qat import LLMQATConfig, prepare, store
from llava_adapters import arch_for
from tests.checkpoint.conftest import PROVENANCE, save_llama
from tests.checkpoint.files import alter_manifest, assert_four_lines, same_bytes, tensors_of
from tests.checkpoint.foreign import foreign, logits_of, logits_of_a_stranger, packed_linears
from tests.tolerances import assert_close

Make = Callable[..., Path]
SETTINGS = ("4-8-4", "4-8-8", "4-8-16", "4-6-16", "8-8-4", "8-8-8", "8-8-16", "4-4-16", "8-16-8")
HEAD = 16
"""Channels of a head of the tiny model."""


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Returns the checkpoint of a tiny Llama at a setting W-A-KV, rounded to nearest; not to be altered."""
    made: dict[tuple[Any, ...], Path] = {}

    def checkpoint(bits: str, group_size: int = -1, **changes: Any) -> Path:
        key = (bits, group_size, *sorted(changes.items()))
        if key not in made:
            folder = tmp_path_factory.mktemp(bits)
            save_llama(folder / "full", **changes)
            config = LLMQATConfig(bits=bits, group_size=group_size, max_steps=0)
            model = transformers.AutoModelForCausalLM.from_pretrained(folder / "full", dtype=torch.float32)
            prepare(model, arch_for("llama"), config)
            opened = open_model(folder / "full", arch_for("llama"))
            store(model, opened, config, folder / "model", source="tiny-llama", provenance=PROVENANCE)
            made[key] = folder / "model"
        return made[key]

    return checkpoint


def entry_of(folder: Path) -> dict[str, Any]:
    entry: dict[str, Any] = read_json(folder / "config.json")["quantization_config"]
    return entry


# ---- what is on disk -----------------------------------------------------------------------------


def test_the_config_names_what_is_quantized(make: Make) -> None:
    entry = entry_of(make("4-8-4"))
    assert entry["format"] == PACKED
    group = entry["config_groups"]["group_0"]
    assert (group["weights"]["num_bits"], group["weights"]["strategy"], group["format"]) == (4, "channel", PACKED)
    common = {"type": "int", "symmetric": True, "dynamic": True, "observer": None}
    assert group["input_activations"] == common | {"num_bits": 8, "strategy": "token", "group_size": None}
    assert entry["kv_cache_scheme"] == common | {"num_bits": 4, "strategy": "group", "group_size": HEAD}
    assert read_manifest(make("4-8-4")).widths == BitWidths(4, 8, 4)


@pytest.mark.parametrize("bits", SETTINGS)
def test_the_library_understands_the_config(make: Make, bits: str) -> None:
    config = QuantizationConfig.model_validate(entry_of(make(bits)))
    scheme = config.config_groups["group_0"]
    found = [scheme.weights, scheme.input_activations, config.kv_cache_scheme]
    assert "-".join(str(args.num_bits if args else 16) for args in found) == bits


def test_eight_bit_weights_and_activations_are_whole_bytes(make: Make) -> None:
    folder = make("8-8-8")
    assert entry_of(folder)["format"] == entry_of(folder)["config_groups"]["group_0"]["format"] == BYTES
    stored = {name: tensor for name, tensor in tensors_of(folder).items() if "layers.0.mlp.down_proj." in name}
    assert {name.rpartition(".")[2]: (t.dtype, tuple(t.shape)) for name, t in stored.items()} == {
        "weight": (torch.int8, (64, 128)),
        "weight_scale": (torch.bfloat16, (64, 1)),
    }


def test_whole_bytes_hold_the_codes_minus_128(make: Make) -> None:
    folder, tensors = make("8-8-16"), tensors_of(make("8-8-16"))
    for path, linear in packed_linears(eqat_mm.load(folder)).items():
        codes = unpack(linear.weight_packed, 8, linear.layout.in_features).int() - 128
        assert torch.equal(codes, tensors[f"{path}.weight"].int())
        assert codes.abs().max() == 127


@pytest.mark.parametrize("in_features", [3, 4, 9])
def test_bytes_and_words_are_the_same(in_features: int) -> None:
    weight = torch.randint(-127, 128, (5, in_features), dtype=torch.int8)
    packed, shape = from_bytes(weight)
    assert torch.equal(unpack(packed, 8, in_features).int() - 128, weight.int())
    state = to_bytes({"a.weight_packed": packed, "a.weight_shape": shape, "a.bias": torch.ones(5)})
    assert state.keys() == {"a.weight", "a.bias"}
    assert same_bytes(state["a.weight"], weight)


@pytest.mark.parametrize(("bits", "wanted"), [("4-8-4", 4 + 16 / 64), ("8-8-8", 8 + 16 / 64), ("8-16-8", 8 + 16 / 64)])
def test_bits_per_weight(make: Make, bits: str, wanted: float) -> None:
    found = bits_per_weight(make(bits, intermediate_size=64))
    assert found == pytest.approx(wanted)


# ---- what we read --------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", SETTINGS)
def test_we_load_what_was_stored(make: Make, bits: str) -> None:
    model, widths = eqat_mm.load(make(bits)), BitWidths.parse(bits)
    linears = packed_linears(model).values()
    assert len(linears) == 14
    assert all(isinstance(linear, DynamicPackedLinear) == (widths.activations < 16) for linear in linears)
    assert all(getattr(linear, "activation_bits", 16) == widths.activations for linear in linears)
    assert kv_cache_bits(model) == widths.kv_cache


@pytest.mark.parametrize("bits", ["4-8-4", "8-8-8"])
@pytest.mark.parametrize(
    "changes", [{"attention_bias": True, "mlp_bias": True}, {"tie_word_embeddings": True}], ids=str
)
def test_biases_and_tied_heads(make: Make, tokens: Tensor, bits: str, changes: dict[str, Any]) -> None:
    folder = make(bits, **changes)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder.parent / "full", dtype=torch.float32)
    prepare(model, arch_for("llama"), LLMQATConfig(bits=bits))
    inputs = {"input_ids": tokens}
    assert_close(logits_of(eqat_mm.load(folder), inputs), logits_of(model, inputs), "model")


@pytest.mark.parametrize("bits", ["4-8-4", "8-8-8"])
def test_step_sizes_trained_afterwards_are_stored_in_the_same_format(make: Make, tmp_path: Path, bits: str) -> None:
    folder = make(bits)
    model = eqat_mm.load(folder)
    name = "model.layers.1.mlp.up_proj"
    with torch.no_grad():
        model.get_parameter(f"{name}.weight_scale").mul_(2.0)
    save_like(model, tmp_path / "tuned", folder, "e2e-qp", PROVENANCE)
    before, after = tensors_of(folder), tensors_of(tmp_path / "tuned")
    assert before.keys() == after.keys()
    assert {key for key in before if not same_bytes(before[key], after[key])} == {f"{name}.weight_scale"}
    assert read_manifest(tmp_path / "tuned").widths == BitWidths.parse(bits)
    assert kv_cache_bits(eqat_mm.load(tmp_path / "tuned")) == BitWidths.parse(bits).kv_cache


@pytest.mark.parametrize(("part", "value"), [("activation_bits", 4), ("kv_cache_bits", 16)])
def test_config_and_manifest_must_agree(make: Make, tmp_path: Path, part: str, value: int) -> None:
    folder = make("8-8-8")
    for path in folder.iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / MANIFEST).unlink()
    shutil.copyfile(folder / MANIFEST, tmp_path / MANIFEST)
    alter_manifest(tmp_path, **{part: value})
    with pytest.raises(CheckpointError) as raised:
        eqat_mm.load(tmp_path)
    assert_four_lines(raised.value)
    assert "8-8-8" in raised.value.given


# ---- what others read ----------------------------------------------------------------------------


@pytest.mark.parametrize("group_size", [-1, 32])
@pytest.mark.parametrize("bits", SETTINGS)
def test_transformers_reads_the_same_weights(make: Make, tokens: Tensor, bits: str, group_size: int) -> None:
    ours, theirs = eqat_mm.load(make(bits, group_size)), foreign(make(bits, group_size))
    logits_of(theirs, {"input_ids": tokens})  # decompresses
    for path, linear in packed_linears(ours).items():
        assert torch.equal(theirs.get_parameter(f"{path}.weight"), linear.dequantize())


@pytest.mark.parametrize("bits", ["4-8-16", "8-8-16", "4-4-16"])
def test_with_their_linears_our_model_gives_their_logits(make: Make, tokens: Tensor, bits: str) -> None:
    ours, theirs, inputs = eqat_mm.load(make(bits)), foreign(make(bits)), {"input_ids": tokens}
    wanted = logits_of(theirs, inputs)
    for path in packed_linears(ours):
        set_submodule(ours, path, theirs.get_submodule(path))
    assert torch.equal(logits_of(ours, inputs), wanted)


@pytest.mark.parametrize("bits", ["4-8-16", "8-8-16", "4-4-16"])
def test_transformers_quantizes_the_activations_of_each_token(make: Make, tokens: Tensor, bits: str) -> None:
    theirs, width = foreign(make(bits)), BitWidths.parse(bits).activations
    logits_of(theirs, {"input_ids": tokens})
    x, linear = torch.randn(2, 5, 64), theirs.get_submodule("model.layers.0.self_attn.q_proj")
    wanted = torch.nn.functional.linear(as_the_library(x, width), linear.weight)  # type: ignore[arg-type]
    with torch.no_grad():
        assert_close(linear(x), wanted, "matmul")


@pytest.mark.parametrize("bits", ["4-8-4", "8-8-8", "8-16-8"])
def test_transformers_quantizes_keys_and_values_per_token_and_head(make: Make, bits: str) -> None:
    theirs, width = foreign(make(bits)), BitWidths.parse(bits).kv_cache
    keys, values = torch.randn(2, 2, 2, 7, HEAD)
    found = theirs.get_submodule("model.layers.0.self_attn.kv_cache")(keys, values, 0)
    for states, given in zip((keys, values), found, strict=True):
        assert_close(given, as_the_library(states, width), "elementwise")


def as_the_library(x: Tensor, bits: int) -> Tensor:
    """Fake quantization of compressed-tensors: its step size is max|X| / (2^N - 1) * 2, a little less than ours."""
    scale = x.abs().amax(-1, keepdim=True) / ((2**bits - 1) / 2)
    return (x / scale).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * scale


@pytest.mark.parametrize("bits", ["4-8-4", "8-8-8"])
def test_a_process_without_this_package_reads_it(make: Make, tokens: Tensor, tmp_path: Path, bits: str) -> None:
    inputs = {"input_ids": tokens}
    logits = logits_of_a_stranger(make(bits), "AutoModelForCausalLM", inputs, tmp_path)
    assert torch.equal(logits, logits_of(foreign(make(bits)), inputs))


def test_transformers_generates(make: Make, tokens: Tensor) -> None:
    theirs: Any = foreign(make("4-8-4"))
    assert theirs.generate(tokens, max_new_tokens=4, do_sample=False, pad_token_id=0).shape[1] > tokens.shape[1]
