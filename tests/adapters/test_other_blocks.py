"""Architectures whose blocks are not all alike, or hold more than linears and norms: declared here, served by none.

Small random models of transformers: hybrids of attention and convolution or state space, blocks that return tuples, a
model that looks at its embedding before it calls it, experts that nothing may touch, linears that are read and not
called, hidden states that the model changes between its blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from eqat_mm.blocks.arch import Arch, Inputs
from eqat_mm.blocks.source import OpenModel, open_model
from eqat_mm.blocks.walker import BlockWalker, capture_front
from eqat_mm.checkpoint.read import load
from eqat_mm.errors import AdapterError
from eqat_mm.quant.spec import QuantSpec
from eqat_mm.runtime.stock import stock_reader
from eqat_mm.train.block_ap import BlockAPConfig, kept_parameters, run_block_ap
from eqat_mm.train.fit import FitConfig
from eqat_mm.train.rtn import run_rtn
from eqat_mm.train.warm_start import WarmStartConfig
from llava_adapters import registry
from tests.checkpoint.files import same_bytes, tensors_of

CPU = torch.device("cpu")
COMMON: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
MLP = (("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",))
FEED_FORWARD = (("feed_forward.gate_proj", "feed_forward.up_proj"), ("feed_forward.down_proj",))
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 1}


@dataclass(frozen=True)
class Kind:
    """One architecture: its configuration and what an adapter would declare."""

    config: str
    fields: dict[str, Any]
    stages: tuple[tuple[str, ...], ...]
    kept: tuple[str, ...] = ()
    norm: str = "model.norm"


KINDS = {
    "qwen3_next": Kind(
        "Qwen3NextConfig",
        {
            "intermediate_size": 128,
            "head_dim": 16,
            "linear_num_value_heads": 4,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
            "num_experts": 0,
            "layer_types": ["linear_attention", "full_attention"],
        },
        (QKV, ("self_attn.o_proj",), ("linear_attn.in_proj_qkvz",), ("linear_attn.out_proj",), *MLP),
        kept=("linear_attn.in_proj_ba",),
    ),
    "lfm2": Kind(
        "Lfm2Config",
        {"intermediate_size": 128, "block_auto_adjust_ff_dim": False, "full_attn_idxs": [1]},
        (
            QKV,
            ("self_attn.out_proj",),
            ("conv.in_proj",),
            ("conv.out_proj",),
            ("feed_forward.w1", "feed_forward.w3"),
            ("feed_forward.w2",),
        ),
        norm="model.embedding_norm",
    ),
    "bamba": Kind(
        "BambaConfig",
        {"intermediate_size": 128, "attn_layer_indices": [1], "mamba_expand": 2, **MAMBA},
        (QKV, ("self_attn.o_proj",), ("mamba.in_proj",), ("mamba.out_proj",), *FEED_FORWARD),
        norm="model.final_layernorm",
    ),
    "falcon_h1": Kind(
        "FalconH1Config",
        {"intermediate_size": 128, "head_dim": 16, "mamba_d_ssm": 128, **MAMBA},
        ((*QKV, "mamba.in_proj"), ("self_attn.o_proj",), ("mamba.out_proj",), *FEED_FORWARD),
        norm="model.final_layernorm",
    ),
    "gpt_oss": Kind(
        "GptOssConfig",
        {"intermediate_size": 64, "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2},
        (QKV, ("self_attn.o_proj",)),
    ),
    "llama4_text": Kind(
        "Llama4TextConfig",
        {"intermediate_size": 64, "intermediate_size_mlp": 128, "head_dim": 16, "moe_layers": []},
        (QKV, ("self_attn.o_proj",), *FEED_FORWARD),
    ),
}


@dataclass
class Saved:
    """A tiny model, in a folder and in memory."""

    arch: Arch
    folder: Path
    model: Any
    batches: list[Inputs]

    def open(self) -> OpenModel:
        return open_model(self.folder, self.arch)


def save(name: str, folder: Path, dtype: torch.dtype = torch.float32) -> Saved:
    """Make the tiny model of a kind and its adapter."""
    kind = KINDS[name]
    config = getattr(transformers, kind.config)(**COMMON | kind.fields)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    model.save_pretrained(folder)
    arch = Arch(
        name=name,
        model_types=(config.model_type,),
        auto_class="AutoModelForCausalLM",
        blocks="model.layers",
        stages=kind.stages,
        kept=kind.kept,
        full_precision=("model.embed_tokens", kind.norm, "lm_head"),
        tiny=lambda: (model, []),
    )
    return Saved(arch, folder, model, [{"input_ids": torch.randint(5, 99, (1, 24))} for _ in range(6)])


@pytest.fixture(scope="module", params=sorted(KINDS))
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    return save(request.param, tmp_path_factory.mktemp(request.param))


@torch.no_grad()
def outputs_of_blocks(model: Any, inputs: Inputs) -> list[Tensor]:
    """Return the hidden states behind every block in the model's own forward."""
    found: list[Tensor] = []

    def note(_: nn.Module, __: Any, output: Any) -> None:
        found.append((output[0] if isinstance(output, tuple) else output).clone())

    handles = [block.register_forward_hook(note) for block in model.model.layers]
    model(**inputs, use_cache=False)
    for handle in handles:
        handle.remove()
    return found


def test_chained_blocks_equal_the_models_own_forward(saved: Saved) -> None:
    expected = outputs_of_blocks(saved.model, saved.batches[0])
    walker = BlockWalker(saved.open(), capture_front(saved.open(), saved.batches[:1], torch.float32), device=CPU)
    for step in walker.walk():
        walker.advance_fp(step)
        walker.advance_quantized(step)
        assert torch.equal(step.fp.read(0), expected[step.index])


@pytest.mark.parametrize("symmetric", [False, True])
def test_plain_transformers_reads_what_is_written(saved: Saved, tmp_path: Path, symmetric: bool) -> None:
    run_rtn(saved.open(), QuantSpec(4, 32, symmetric=symmetric), tmp_path, source="tiny", provenance={})
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(registry.known_archs(), saved.arch.name, saved.arch)
        ours = load(tmp_path / "model").eval()
    with stock_reader():
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    with torch.no_grad():
        found, expected = (model(saved.batches[0]["input_ids"], use_cache=False).logits for model in (ours, theirs))
    assert (found - expected).norm() < 5e-3 * expected.norm()


def test_training_changes_linears_and_norms_and_nothing_else(saved: Saved, tmp_path: Path) -> None:
    fit = FitConfig(epochs=2, validation_samples=0, lr_weight=1e-3, lr_norm=1e-3)
    config = BlockAPConfig(quant=QuantSpec(2, 32), fit=fit)
    run_block_ap(saved.open(), saved.batches, config, tmp_path, device=CPU, source="tiny", provenance={"config": {}})
    before, after = tensors_of(saved.folder), tensors_of(tmp_path / "model")
    kept = kept_parameters(saved.open())
    blocks = range(len(saved.open().blocks))
    names = [name for i in blocks for path in kept if (name := f"model.layers.{i}.{path}") in before]
    assert bool(names) is bool(kept)
    assert all(same_bytes(before[name], after[name]) for name in names)
    changed = {name for name in before.keys() & after.keys() if not same_bytes(before[name], after[name])}
    assert changed
    assert all("norm" in name for name in changed)


def test_statistics_are_taken_of_the_stages_that_a_block_has(saved: Saved, tmp_path: Path) -> None:
    start, fit = WarmStartConfig(init="refined"), FitConfig(epochs=0)
    config = BlockAPConfig(quant=QuantSpec(4, 32), start=start, fit=fit)
    run_block_ap(saved.open(), saved.batches, config, tmp_path, device=CPU, source="tiny", provenance={"config": {}})
    names = {name for name in tensors_of(tmp_path / "model") if name.endswith("weight_packed")}
    assert len(names) == sum(len(saved.arch.linears_of(block)) for block in saved.open().blocks)


@pytest.mark.parametrize("name", ["bamba", "falcon_h1"])
def test_a_linear_that_is_read_gives_gradients_to_its_step_sizes(name: str, tmp_path: Path) -> None:
    made = save(name, tmp_path / "full")
    run_rtn(made.open(), QuantSpec(4, 32), tmp_path, source="tiny", provenance={})
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(registry.known_archs(), name, made.arch)
        model = load(tmp_path / "model").train()
    model(made.batches[0]["input_ids"], use_cache=False).logits.square().sum().backward()
    scales = {name: p.grad for name, p in model.named_parameters() if name.endswith("weight_scale")}
    assert [name for name, grad in scales.items() if grad is None or not grad.any()] == []


def test_a_linear_that_no_adapter_mentions_is_refused(tmp_path: Path) -> None:
    made = save("qwen3_next", tmp_path)
    with pytest.raises(AdapterError) as caught:
        open_model(tmp_path, Arch(**vars(made.arch) | {"kept": ()}))
    assert caught.value.where == "adapter qwen3_next: model.layers.0.linear_attn.in_proj_ba"
    assert "in `stages` (quantized) or in `kept`" in caught.value.allowed


def test_factors_are_those_of_float32_whatever_the_files_hold(tmp_path: Path) -> None:
    """Gemma multiplies its embedding by the root of its width, rounded to the dtype that the model is built in."""
    fields = COMMON | {"hidden_size": 96, "intermediate_size": 128, "head_dim": 24, "num_key_value_heads": 1}
    config = transformers.GemmaConfig(**fields)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    model.save_pretrained(tmp_path)
    arch = Arch(
        name="gemma",
        model_types=("gemma",),
        auto_class="AutoModelForCausalLM",
        blocks="model.layers",
        stages=(QKV, ("self_attn.o_proj",), *MLP),
        full_precision=("model.embed_tokens", "model.norm", "lm_head"),
        tiny=lambda: (model, []),
    )
    inputs = {"input_ids": torch.randint(5, 99, (1, 24))}
    expected = outputs_of_blocks(
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32), inputs
    )
    opened = open_model(tmp_path, arch)
    walker = BlockWalker(opened, capture_front(opened, [inputs], torch.float32), device=CPU)
    for step in walker.walk():
        walker.advance_fp(step)
        walker.advance_quantized(step)
        assert torch.equal(step.fp.read(0), expected[step.index])


def test_blocks_that_share_keys_and_values_are_refused_by_name(tmp_path: Path) -> None:
    """Of a Gemma-4 with these settings the last two blocks read what the first two leave for them."""
    own = {"intermediate_size": 128, "head_dim": 16, "global_head_dim": 16, "num_hidden_layers": 4}
    sizes = {"vocab_size_per_layer_input": 99, "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 2}
    config = transformers.Gemma4TextConfig(
        **COMMON | own | sizes, layer_types=["sliding_attention", "full_attention"] * 2
    )
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(tmp_path)
    parts = (
        "embed_tokens",
        "norm",
        "embed_tokens_per_layer",
        "per_layer_model_projection",
        "per_layer_projection_norm",
    )
    arch = Arch(
        name="gemma4_text",
        model_types=("gemma4_text",),
        auto_class="AutoModelForCausalLM",
        blocks="model.layers",
        stages=(QKV, ("self_attn.o_proj",), *MLP),
        kept=("per_layer_input_gate", "per_layer_projection"),
        full_precision=(*(f"model.{part}" for part in parts), "lm_head"),
        tiny=lambda: (model, []),
    )
    with pytest.raises(AdapterError) as caught:
        list(capture_front(open_model(tmp_path, arch), [{"input_ids": torch.randint(5, 99, (1, 12))}], torch.float32))
    assert caught.value.where == "block 0 (Gemma4TextDecoderLayer): shared_kv_states"
