"""Experts that are split compute what merged ones do, and are read from the tensors of single experts in files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from eqat_mm.blocks.arch import Arch
from eqat_mm.blocks.experts import SplitExperts, split_experts
from eqat_mm.blocks.source import SINGLE, open_model
from eqat_mm.blocks.weights import WeightSource
from eqat_mm.checkpoint.read import load
from eqat_mm.errors import AdapterError, CheckpointError
from eqat_mm.quant.spec import QuantSpec
from eqat_mm.train.rtn import run_rtn
from llava_adapters import arch_for
from llava_adapters.tiny import tiny_causal_lm
from tests.tolerances import assert_close

MODELS = ("mixtral", "qwen3_moe")
STORED = {
    "mixtral": "model.layers.0.block_sparse_moe.experts.2.w1.weight",
    "qwen3_moe": "model.layers.0.mlp.experts.2.gate_proj.weight",
}


def merged(experts: int = 3, hidden: int = 8, inner: int = 4) -> Any:
    """Merged experts of Mixtral with random weights."""
    import transformers
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    config = transformers.MixtralConfig(hidden_size=hidden, intermediate_size=inner, num_local_experts=experts)
    config._experts_implementation = "eager"
    module = MixtralExperts(config)
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module


def routed(tokens: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, two of three experts for each token but the last of them, and weights."""
    return torch.randn(tokens, 8), torch.tensor([[0, 1]] * tokens), torch.rand(tokens, 2)


@pytest.mark.parametrize("training", [False, True])
def test_split_experts_compute_what_merged_ones_do(training: bool) -> None:
    module = merged()
    split = SplitExperts(module, "experts").train(training)
    given = routed()
    assert_close(split(*given), module(*given), "matmul")


def test_in_training_every_expert_has_gradients() -> None:
    split = SplitExperts(merged(), "experts").train()
    split(*routed()).sum().backward()
    idle = [parameter.grad for parameter in split[2].parameters()]
    assert all(grad is not None and not grad.any() for grad in idle)
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in split[0].parameters())


def test_linears_are_views_of_the_merged_parameters() -> None:
    module = merged()
    split = SplitExperts(module, "experts")
    assert torch.equal(split[1].up_proj.weight, module.gate_up_proj[1, 4:])
    assert split[1].up_proj.weight.untyped_storage().data_ptr() == module.gate_up_proj.untyped_storage().data_ptr()


def test_routing_is_noted_and_replayed() -> None:
    split = SplitExperts(merged(), "experts")
    hidden, index, weights = routed()
    other = torch.tensor([[1, 2]] * len(hidden))
    expected = split(hidden, other, weights)
    with split.noted() as calls:
        split(hidden, other, top_k_weights=weights)
    assert torch.equal(calls[0], other)
    with split.replayed(calls):
        assert torch.equal(split(hidden, top_k_index=index, top_k_weights=weights), expected)
    assert not split._forward_pre_hooks


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"has_bias": True}, "has_bias"),
        ({"is_transposed": True}, "is_transposed"),
        ({"is_concatenated": False}, "is_concatenated"),
        ({"down_proj": nn.Parameter(torch.zeros(3, 4, 8))}, "down_proj [3, 4, 8]"),
        ({"gate_up_proj_bias": nn.Parameter(torch.zeros(3, 8))}, "further parameters"),
        ({"_apply_gate": lambda x: x.chunk(2, -1)[0]}, "a gate that is not act(gate) * up"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_experts_of_another_layout_are_refused_by_name(change: dict[str, Any], said: str) -> None:
    root = nn.ModuleDict({"experts": merged()})
    for name, value in change.items():
        setattr(root["experts"], name, value)
    with pytest.raises(AdapterError) as caught:
        split_experts(root, ["experts", "nowhere"])
    assert caught.value.where == "experts: MixtralExperts"
    assert said in caught.value.given


def saved(name: str, folder: Path, **fields: Any) -> Arch:
    arch = arch_for(name)
    experts = {"mixtral": {"num_local_experts": 4}, "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 32}}
    model, _ = tiny_causal_lm(name, **experts[name], **fields)
    model.save_pretrained(folder)  # type: ignore[operator]
    return arch


@pytest.mark.parametrize("name", MODELS)
def test_weights_are_read_from_the_tensors_of_single_experts(name: str, tmp_path: Path) -> None:
    opened = open_model(tmp_path, saved(name, tmp_path))
    assert not [
        path for path, _ in opened.model.named_parameters() if path.endswith(("gate_up_proj", "experts.down_proj"))
    ]
    path = "model.layers.0.mlp.experts.2.gate_proj.weight"
    assert opened.source.published_name(path) == STORED[name]
    opened.source.materialise(opened.blocks[0], "model.layers.0.", torch.float32, torch.device("cpu"))
    assert torch.equal(opened.model.get_parameter(path), load_file(tmp_path / SINGLE)[STORED[name]])


@pytest.mark.parametrize("name", MODELS)
def test_a_model_saved_without_its_head_is_read_too(name: str, tmp_path: Path) -> None:
    """From the class without a head, names have no `model.` in front."""
    arch = saved(name, tmp_path, tie_word_embeddings=True)
    tensors = load_file(tmp_path / SINGLE)
    save_file({key.removeprefix("model."): value for key, value in tensors.items()}, tmp_path / SINGLE)
    source = open_model(tmp_path, arch).source
    assert source.stored_name("model.layers.0.mlp.experts.2.gate_proj.weight") == STORED[name].removeprefix("model.")
    assert source.published_name("model.layers.0.mlp.experts.2.gate_proj.weight") == STORED[name]


@pytest.mark.parametrize("name", MODELS)
def test_an_expert_that_is_missing_is_named(name: str, tmp_path: Path) -> None:
    arch = saved(name, tmp_path)
    tensors = load_file(tmp_path / SINGLE)
    save_file({key: value for key, value in tensors.items() if key != STORED[name]}, tmp_path / SINGLE)
    with pytest.raises(CheckpointError, match=r"no tensor model\.layers\.0\.mlp\.experts\.2\.gate_proj\.weight"):
        open_model(tmp_path, arch)


@pytest.mark.parametrize("name", MODELS)
def test_files_have_published_names_and_routers_are_ignored_under_both(name: str, tmp_path: Path) -> None:
    arch = saved(name, tmp_path / "full")
    run_rtn(open_model(tmp_path / "full", arch), QuantSpec(4, 32), tmp_path, source="tiny", provenance={})
    stored = WeightSource(tmp_path / "model").names()
    module = STORED[name].removesuffix("weight")
    assert {f"{module}weight_packed", f"{module}weight_scale", f"{module}weight_shape"} <= set(stored)
    assert STORED[name] not in stored
    ignore = load(tmp_path / "model").checkpoint_origin.config["quantization_config"]["ignore"]
    gates = {"mixtral": ["re:.*mlp.gate$", "re:.*block_sparse_moe.gate$"], "qwen3_moe": ["re:.*mlp.gate$"]}
    assert [entry for entry in ignore if "gate" in entry] == gates[name]


def test_a_checkpoint_that_is_saved_again_is_the_same(tmp_path: Path) -> None:
    arch = saved("mixtral", tmp_path / "full")
    run_rtn(open_model(tmp_path / "full", arch), QuantSpec(4, 32), tmp_path, source="tiny", provenance={})
    load(tmp_path / "model").save_pretrained(tmp_path / "again")
    before, after = (WeightSource(tmp_path / name) for name in ("model", "again"))
    assert set(before.names()) == set(after.names())
    assert all(torch.equal(before.read(name), after.read(name)) for name in before.names())
