"""What is in the folder: shards, index, config, manifest, and everything that came with the model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

import eqat_mm
from eqat_mm.blocks.source import INDEX, open_model
from eqat_mm.checkpoint import CheckpointWriter, read_manifest, save_like, verify_checkpoint, write
from eqat_mm.checkpoint.layout import described, is_as_written, quantization_config
from eqat_mm.errors import CheckpointError
from eqat_mm.quant.packed_linear import PackedLinear
from eqat_mm.quant.spec import QuantSpec
from eqat_mm.runtime.files import read_json, sha256_of
from eqat_mm.train.rtn import run_rtn
from llava_adapters import arch_for
from tests.checkpoint.conftest import PROVENANCE, Pack, save_llama
from tests.checkpoint.files import same_bytes, tensors_of

COMPANIONS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "preprocessor_config.json",
    "LICENSE",
    "LICENSE.txt",
    "NOTICE",
)
STRANGERS = ("trainer_state.json", "asset.json", "pytorch_model.bin", "notes.md")


def test_there_is_a_shard_per_block_and_one_for_the_rest(pack: Pack) -> None:
    folder = pack()
    shards = [f"model-{index:05d}-of-00003.safetensors" for index in (1, 2, 3)]
    assert sorted(path.name for path in folder.glob("*.safetensors")) == shards
    weight_map = read_json(folder / INDEX)["weight_map"]
    assert set(weight_map) == set(tensors_of(folder))
    assert {name for name, shard in weight_map.items() if shard == shards[2]} == {
        "model.embed_tokens.weight",
        "model.norm.weight",
        "lm_head.weight",
    }
    assert all(shard == shards[1] for name, shard in weight_map.items() if ".layers.1." in name)


def test_each_linear_is_stored_as_documented(pack: Pack) -> None:
    tensors = tensors_of(pack(QuantSpec(3, 32)))
    stored = {
        name.rpartition(".")[2]: (tensor.dtype, tuple(tensor.shape))
        for name, tensor in tensors.items()
        if name.startswith("model.layers.0.mlp.down_proj.")
    }
    assert stored == {
        "weight_packed": (torch.int32, (64, 128 * 3 // 32)),
        "weight_scale": (torch.bfloat16, (64, 4)),
        "weight_zero_point": (torch.int32, (64 * 3 // 32, 4)),
        "weight_shape": (torch.int64, (2,)),
    }
    assert tensors["model.layers.0.mlp.down_proj.weight_shape"].tolist() == [64, 128]


def test_the_symmetric_grid_stores_no_zero_points(pack: Pack) -> None:
    assert not [name for name in tensors_of(pack(QuantSpec(4, 64, symmetric=True))) if "zero_point" in name]


@pytest.mark.parametrize("scale_dtype", ["bfloat16", "float16"])
def test_step_sizes_are_stored_in_16_bits(pack: Pack, scale_dtype: str) -> None:
    spec = QuantSpec(4, 64, scale_dtype=scale_dtype)  # type: ignore[arg-type]
    folder = pack(spec)
    stored = {name: tensor for name, tensor in tensors_of(folder).items() if name.endswith("weight_scale")}
    assert len(stored) == 14
    assert {tensor.dtype for tensor in stored.values()} == {spec.storage_dtype}
    model = eqat_mm.load(folder)
    for name, tensor in stored.items():
        assert model.get_parameter(name).dtype is torch.float32
        assert torch.equal(model.get_parameter(name), tensor.float())


def test_quantization_config(pack: Pack) -> None:
    folder = pack(QuantSpec(3, 32))
    config = read_json(folder / "config.json")
    entry = config.pop("quantization_config")
    before = read_json(folder.parent / "full" / "config.json")
    assert config == before | {"torch_dtype": "bfloat16", "rope_theta": before["rope_parameters"]["rope_theta"]}
    weights = entry["config_groups"]["group_0"].pop("weights")
    assert entry == {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "format": "pack-quantized",
                "targets": ["Linear"],
                "input_activations": None,
                "output_activations": None,
            }
        },
        "ignore": ["re:.*lm_head.*"],
        "kv_cache_scheme": None,
        "dequantize": True,
    }
    assert weights == {
        "num_bits": 3,
        "type": "int",
        "symmetric": False,
        "strategy": "group",
        "group_size": 32,
        "dynamic": False,
        "actorder": None,
        "observer": "minmax",
    }


def test_one_group_per_row_is_the_strategy_channel(pack: Pack) -> None:
    entry = read_json(pack(QuantSpec(4, -1, symmetric=True)) / "config.json")["quantization_config"]
    weights = entry["config_groups"]["group_0"]["weights"]
    assert (weights["strategy"], weights["group_size"], weights["symmetric"]) == ("channel", None, True)
    assert "dequantize" not in entry


def test_the_manifest_says_what_made_the_checkpoint(pack: Pack) -> None:
    folder = pack(QuantSpec(3, 32))
    manifest = read_manifest(folder)
    assert QuantSpec(**manifest.spec) == QuantSpec(3, 32)
    assert (manifest.arch, manifest.stage, manifest.source) == ("llama", "round-to-nearest", "tiny-llama")
    assert manifest.provenance == [PROVENANCE]
    decides = [
        *folder.glob("*.safetensors"),
        *(folder / name for name in (INDEX, "config.json", "generation_config.json")),
    ]
    assert manifest.files == {path.name: sha256_of(path) for path in decides}
    assert manifest.auto_class == "AutoModelForCausalLM"
    assert verify_checkpoint(folder) == manifest
    assert json.loads((folder / "eqat.json").read_text())["format_version"] == 3


def test_companions_are_copied_byte_for_byte(tmp_path: Path) -> None:
    save_llama(tmp_path / "full")
    for name in (*COMPANIONS, *STRANGERS):
        (tmp_path / "full" / name).write_bytes(name.encode() + b"\r\n\xff\x00")
    opened = open_model(tmp_path / "full", arch_for("llama"))
    run_rtn(opened, QuantSpec(), tmp_path, source="tiny", provenance={})
    for name in (*COMPANIONS, "generation_config.json"):
        assert (tmp_path / "model" / name).read_bytes() == (tmp_path / "full" / name).read_bytes()
    assert not any((tmp_path / "model" / name).exists() for name in STRANGERS)
    save_like(eqat_mm.load(tmp_path / "model"), tmp_path / "tuned", tmp_path / "model", "e2e-qp", {})
    assert {path.name for path in (tmp_path / "tuned").iterdir()} == {
        path.name for path in (tmp_path / "model").iterdir()
    }
    for name in COMPANIONS:
        assert (tmp_path / "tuned" / name).read_bytes() == (tmp_path / "full" / name).read_bytes()


def test_nothing_is_a_checkpoint_before_it_is_finished(tmp_path: Path) -> None:
    save_llama(tmp_path / "full")
    opened = open_model(tmp_path / "full", arch_for("llama"))
    writer = CheckpointWriter(tmp_path / "model", opened, QuantSpec())
    opened.source.materialise(opened.blocks[0], "model.layers.0.", torch.float32, torch.device("cpu"))
    writer.write_block(0, opened.blocks[0])
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["model-00001-of-00003.safetensors"]
    with pytest.raises(CheckpointError, match="interrupted run"):
        eqat_mm.load(tmp_path / "model")


def train(model: nn.Module) -> None:
    """Change every step size, as end-to-end training does."""
    for module in model.modules():
        if isinstance(module, PackedLinear):
            with torch.no_grad():
                module.weight_scale.mul_(1.25)


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}, {"attention_bias": True}])
@pytest.mark.parametrize("symmetric", [True, False])
def test_training_changes_the_step_sizes_and_not_a_byte_else(
    pack: Pack, tmp_path: Path, tokens: torch.Tensor, changes: dict[str, bool], symmetric: bool
) -> None:
    base = pack(QuantSpec(3, 32, symmetric), **changes)
    model = eqat_mm.load(base)
    train(model)
    manifest = save_like(model, tmp_path / "tuned", base, "e2e-qp", {"command": "eqat e2e-qp"})
    before, after = tensors_of(base), tensors_of(tmp_path / "tuned")
    assert set(before) == set(after)
    changed = {name for name in before if not same_bytes(before[name], after[name])}
    assert changed == {name for name in before if name.endswith("weight_scale")}
    assert all(torch.equal(after[name].float(), before[name].float().mul(1.25).bfloat16().float()) for name in changed)
    for name in ("config.json", "generation_config.json"):
        assert (base / name).read_bytes() == (tmp_path / "tuned" / name).read_bytes()
    assert manifest == verify_checkpoint(tmp_path / "tuned")
    assert (manifest.stage, manifest.source, manifest.spec) == ("e2e-qp", "tiny-llama", read_manifest(base).spec)
    assert manifest.provenance == [PROVENANCE, {"command": "eqat e2e-qp"}]
    for module in model.modules():
        if isinstance(module, PackedLinear):
            module.round_scales()
    with torch.no_grad():
        expected = model(input_ids=tokens).logits
        assert torch.equal(eqat_mm.load(tmp_path / "tuned")(input_ids=tokens).logits, expected)


def test_a_checkpoint_is_replaced_even_by_its_own_copy(pack: Pack, tmp_path: Path) -> None:
    shutil.copytree(pack(), tmp_path / "model")
    (tmp_path / "model" / "stale.json").write_text("{}")
    model = eqat_mm.load(tmp_path / "model")
    train(model)
    save_like(model, tmp_path / "model", tmp_path / "model", "e2e-qp", {})
    assert verify_checkpoint(tmp_path / "model").stage == "e2e-qp"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("there", [True, False])
def test_a_failure_midway_leaves_nothing(
    pack: Pack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: bool
) -> None:
    base = pack()
    if there:
        shutil.copytree(base, tmp_path / "tuned")
    written: list[Path] = []
    save_shard = write.save_shard

    def fail_at_the_second(path: Path, tensors: dict[str, torch.Tensor]) -> None:
        if written:
            raise OSError("no space left on device")
        written.append(path)
        save_shard(path, tensors)

    model = eqat_mm.load(base)
    monkeypatch.setattr(write, "save_shard", fail_at_the_second)
    with pytest.raises(OSError, match="no space left"):
        save_like(model, tmp_path / "tuned", base, "e2e-qp", {})
    assert len(written) == 1
    assert [path.name for path in tmp_path.iterdir()] == (["tuned"] if there else [])
    if there:
        assert verify_checkpoint(tmp_path / "tuned") == read_manifest(base)


def test_each_width_is_a_group_of_its_own() -> None:
    """Read back from targets, also where one path ends another's number."""
    table = {"layers.1.up": 3, "layers.11.up": 2, "layers.0.self_attn.q_proj": 3}
    spec = QuantSpec(2, 64, symmetric=True, allocation=table)
    entry = quantization_config(spec, ["re:.*lm_head.*"], loose=["model.image_newline"])
    groups = list(entry["config_groups"].values())
    assert [group["weights"]["num_bits"] for group in groups] == [2, 3]
    assert groups[0]["targets"] == [r"re:.*layers\.11\.up$"]
    assert groups[1]["targets"] == [r"re:.*layers\.1\.up$", r"re:.*layers\.0\.self_attn\.q_proj$"]
    assert "dequantize" not in entry  # on that route transformers takes the bits of the first group for all
    assert described({"quantization_config": entry}, torch.bfloat16, "here")[0] == spec
    assert is_as_written(entry)
    groups[1]["weights"]["group_size"] = 32
    with pytest.raises(CheckpointError, match="groups that differ"):
        described({"quantization_config": entry}, torch.bfloat16, "here")
    assert not is_as_written(entry)
