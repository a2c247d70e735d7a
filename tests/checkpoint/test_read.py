"""Loading, and what is said of folders that are damaged, unfinished or foreign."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import nn

import eqat_mm
from eqat_kernels import use
from eqat_mm.blocks.source import open_model
from eqat_mm.checkpoint.layout import described, quantization_config
from eqat_mm.checkpoint.manifest import MANIFEST
from eqat_mm.checkpoint.read import load_block
from eqat_mm.checkpoint.write import CheckpointWriter
from eqat_mm.errors import CheckpointError, ConfigError
from eqat_mm.quant.bit_widths import BitWidths
from eqat_mm.quant.narrow import NarrowEmbedding, NarrowLinear, narrow_matrices
from eqat_mm.quant.packed_linear import PackedLinear
from eqat_mm.quant.spec import BITS, GROUP_SIZES, QuantSpec
from eqat_mm.runtime.files import read_json, write_json
from eqat_mm.train.rtn import run_rtn
from llava_adapters import arch_for
from tests.checkpoint.conftest import Pack, save_llama
from tests.checkpoint.files import (
    alter_config,
    alter_tensors,
    assert_four_lines,
    of_version_1,
    reseal,
    shard_of,
    tensors_of,
)
from tests.tiny_model import tiny_llama
from tests.tolerances import assert_close


@pytest.fixture
def folder(pack: Pack, tmp_path: Path) -> Path:
    """A checkpoint to be altered."""
    shutil.copytree(pack(), tmp_path / "model")
    return tmp_path / "model"


def refused(folder: Path, *, verify: bool = True) -> CheckpointError:
    """Return the error that loading gives."""
    with pytest.raises(CheckpointError) as caught:
        eqat_mm.load(folder, verify=verify)
    assert_four_lines(caught.value)
    assert str(folder) in caught.value.where
    return caught.value


def test_linears_stay_packed_and_only_step_sizes_train(folder: Path) -> None:
    model = eqat_mm.load(str(folder))
    packed = [module for module in model.modules() if isinstance(module, PackedLinear)]
    assert len(packed) == 14
    assert {module.spec for module in packed} == {QuantSpec(3, 32)}
    assert [module for module in model.model.layers.modules() if isinstance(module, nn.Linear)] == []
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(trainable) == 14
    assert all(name.endswith(".weight_scale") for name in trainable)
    assert not model.training
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    stored = tensors_of(folder)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, stored[name].to(tensor.dtype))


@pytest.mark.parametrize("changes", [{}, {"attention_bias": True}], ids=["plain", "bias"])
@pytest.mark.parametrize("symmetric", [False, True])
def test_a_block_is_loaded_from_its_shard_alone(pack: Pack, changes: dict[str, Any], symmetric: bool) -> None:
    spec = QuantSpec(3, 32, symmetric=symmetric)
    folder = pack(spec, **changes)
    opened, whole = open_model(folder.parent / "full", arch_for("llama")), eqat_mm.load(folder)
    name, block = opened.block_name(1), opened.blocks[1]
    load_block(CheckpointWriter(folder, opened, spec).shard(1), opened, name, block, spec, torch.device("cpu"))
    expected, found = whole.get_submodule(name).state_dict(), block.state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[key], value) and found[key].dtype is value.dtype for key, value in expected.items())
    assert not any(parameter.requires_grad for parameter in block.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_unquantized_parts_take_the_wanted_dtype(folder: Path, dtype: torch.dtype) -> None:
    model = eqat_mm.load(folder, dtype=dtype)
    assert model.lm_head.weight.dtype is dtype
    assert model.model.layers[0].input_layernorm.weight.dtype is dtype
    assert model.model.layers[0].mlp.up_proj.weight_scale.dtype is torch.float32
    with torch.no_grad():
        assert model(input_ids=torch.tensor([[1, 2, 3]])).logits.dtype is dtype


def test_a_tied_head_is_stored_once_and_tied_again(pack: Pack) -> None:
    folder = pack(QuantSpec(3, 32), tie_word_embeddings=True)
    assert "lm_head.weight" not in tensors_of(folder)
    model = eqat_mm.load(folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not model.lm_head.weight.is_meta


def test_generation_settings_are_kept(folder: Path) -> None:
    settings = read_json(folder / "generation_config.json") | {"max_new_tokens": 7}
    write_json(folder / "generation_config.json", settings)
    model = eqat_mm.load(folder, verify=False)
    assert model.generation_config.max_new_tokens == 7
    output = model.generate(  # type: ignore[operator]
        torch.tensor([[5, 6]]), do_sample=False, pad_token_id=0
    )
    assert output.shape == (1, 9)


def flip(path: Path) -> None:
    """Change one bit in the middle of the numbers."""
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(bytes(data))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


@pytest.mark.parametrize("damage", [flip, truncate, Path.unlink], ids=["altered", "truncated", "missing"])
@pytest.mark.parametrize("name", ["model.layers.0.mlp.up_proj.weight_packed", "lm_head.weight"])
def test_a_damaged_shard(folder: Path, damage: Callable[[Path], None], name: str) -> None:
    shard = shard_of(folder, name)
    damage(shard)
    error = refused(folder)
    assert error.where == str(shard)
    assert MANIFEST in error.allowed


@pytest.mark.parametrize("damage", [truncate, Path.unlink], ids=["truncated", "missing"])
def test_a_damaged_shard_is_noticed_without_verification(folder: Path, damage: Callable[[Path], None]) -> None:
    damage(shard_of(folder, "lm_head.weight"))
    refused(folder, verify=False)


def test_a_missing_tensor(folder: Path) -> None:
    shard = shard_of(folder, "model.norm.weight")
    tensors = tensors_of(folder)
    del tensors["model.norm.weight"]
    kept = {name: tensor for name, tensor in tensors.items() if shard_of(folder, name) == shard}
    save_file(kept, shard)
    assert "model.norm.weight" in refused(folder, verify=False).given


@pytest.mark.parametrize("verify", [True, False])
def test_a_missing_manifest(folder: Path, verify: bool) -> None:
    (folder / MANIFEST).unlink()
    error = refused(folder, verify=verify)
    assert error.given == f"no {MANIFEST} in it"
    assert "interrupted run" in error.do


@pytest.mark.parametrize("verify", [True, False])
def test_a_folder_that_does_not_exist(tmp_path: Path, verify: bool) -> None:
    assert refused(tmp_path / "nowhere", verify=verify).given == "no such folder"


def test_a_file_in_place_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "model").write_text("")
    refused(tmp_path / "model")


def test_a_full_precision_folder(tmp_path: Path) -> None:
    save_llama(tmp_path)
    refused(tmp_path)


def test_a_folder_quantized_by_others(tmp_path: Path) -> None:
    save_llama(tmp_path)
    config = read_json(tmp_path / "config.json")
    write_json(tmp_path / "config.json", config | {"quantization_config": {"quant_method": "gptq", "bits": 4}})
    assert MANIFEST in refused(tmp_path).given


def foreign(**changes: Any) -> dict[str, Any]:
    """A config of ours with some changes to its `quantization_config`."""
    return {"quantization_config": quantization_config(QuantSpec(), []) | changes}


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"quantization_config": {"quant_method": "gptq", "bits": 4}},
        foreign(format="marlin-24"),
        foreign(config_groups={}),
        foreign(config_groups=foreign()["quantization_config"]["config_groups"] | {"group_1": {}}),
    ],
)
def test_a_config_of_another_format(folder: Path, config: dict[str, Any]) -> None:
    raw = read_json(folder / "config.json")
    del raw["quantization_config"]
    write_json(folder / "config.json", raw | config)
    reseal(folder)
    assert "'pack-quantized', with groups that differ in bits alone" in refused(folder).allowed


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("scale_dtype", ["bfloat16", "float16"])
def test_the_spec_travels_in_the_config(bits: int, group_size: int, symmetric: bool, scale_dtype: Any) -> None:
    spec = QuantSpec(bits, group_size, symmetric, scale_dtype)
    found = described({"quantization_config": quantization_config(spec, [])}, spec.storage_dtype, "here")
    assert found == (spec, BitWidths(bits))


def test_by_default_the_unquantized_parts_are_float32_on_a_cpu(folder: Path) -> None:
    assert eqat_mm.load(folder).dtype is torch.float32
    assert eqat_mm.load(folder, dtype="bfloat16").lm_head.weight.dtype is torch.bfloat16


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=torch.tensor([[1, 2, 3, 4]])).logits
    return found


@pytest.mark.parametrize(
    "architectures", [None, [], [True], ["MyLlamaForCausalLM"], ["LlamaModel"], "LlamaForCausalLM"]
)
@pytest.mark.filterwarnings("ignore:.*version 1")
@pytest.mark.parametrize("version", [1, 3])
def test_the_class_does_not_come_from_the_architectures(folder: Path, architectures: Any, version: int) -> None:
    wanted = logits(eqat_mm.load(folder))
    alter_config(folder, architectures=architectures)
    if version == 1:
        write_json(folder / MANIFEST, of_version_1(folder))
    assert type(eqat_mm.load(folder)).__name__ == "LlamaForCausalLM"
    assert torch.equal(logits(eqat_mm.load(folder)), wanted)


@pytest.mark.parametrize("bits", [3, 8])
def test_names_without_the_prefix_of_the_base_class(tmp_path: Path, bits: int) -> None:
    save_llama(tmp_path / "full", tie_word_embeddings=True)
    spec, opened = QuantSpec(bits, 32), lambda: open_model(tmp_path / "full", arch_for("llama"))
    run_rtn(opened(), spec, tmp_path / "a", source="tiny", provenance={})
    tensors = tensors_of(tmp_path / "full")
    stripped = {name.removeprefix("model."): tensor for name, tensor in tensors.items() if name != "lm_head.weight"}
    save_file(stripped, tmp_path / "full" / "model.safetensors", metadata={"format": "pt"})
    run_rtn(opened(), spec, tmp_path / "b", source="tiny", provenance={})
    assert tensors_of(tmp_path / "a/model").keys() == tensors_of(tmp_path / "b/model").keys()
    left, right = (eqat_mm.load(tmp_path / name / "model") for name in "ab")
    assert torch.equal(logits(left), logits(right))


@pytest.mark.parametrize("stored", ["embedding", "head", "both"])
def test_a_tied_pair_is_read_as_transformers_reads_it(tmp_path: Path, stored: str) -> None:
    """It may store either or both."""
    save_llama(tmp_path / "full", tie_word_embeddings=True)
    path = tmp_path / "full" / "model.safetensors"
    tensors = tensors_of(tmp_path / "full")
    embedding = tensors.pop("model.embed_tokens.weight")
    if stored != "head":
        tensors["model.embed_tokens.weight"] = embedding
    if stored != "embedding":
        tensors["lm_head.weight"] = embedding.clone()
    save_file(tensors, path, metadata={"format": "pt"})
    run_rtn(open_model(tmp_path / "full", arch_for("llama")), QuantSpec(8, 32), tmp_path, source="tiny", provenance={})
    model = eqat_mm.load(tmp_path / "model")
    full = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "full", dtype=torch.float32)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, full.lm_head.weight)
    assert torch.equal(model.model.embed_tokens.weight, full.model.embed_tokens.weight)
    assert (logits(model) - logits(full)).abs().max() < 0.1 * logits(full).abs().max()


def test_a_run_folder_stands_for_its_checkpoint(pack: Pack) -> None:
    folder = pack()
    assert torch.equal(logits(eqat_mm.load(folder.parent)), logits(eqat_mm.load(folder)))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_step_sizes_that_are_not_finite(folder: Path, value: float) -> None:
    name = "model.layers.0.mlp.up_proj.weight_scale"

    def spoil(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        tensors[name][0, 0] = value
        return tensors

    alter_tensors(shard_of(folder, name), spoil)
    assert name in str(refused(folder))


def test_kernels_that_cannot_run_here_are_an_error_of_the_user(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EQAT_KERNELS", "fastest")
    with use("fastest"), pytest.raises(ConfigError, match="EQAT_KERNELS") as caught:
        eqat_mm.load(folder)
    assert_four_lines(caught.value)
    assert "'fastest' does not exist" in caught.value.given


def test_a_folder_with_one_run_in_it_is_that_run(pack: Pack, tmp_path: Path) -> None:
    shutil.copytree(pack(), tmp_path / "runs" / "block-ap" / "model")
    shutil.copytree(pack(), tmp_path / "runs" / ".hidden" / "model")
    (tmp_path / "runs" / "eval").mkdir()
    origin: Any = eqat_mm.load(tmp_path / "runs").checkpoint_origin
    assert origin.folder == tmp_path / "runs" / "block-ap" / "model"
    shutil.copytree(pack(), tmp_path / "runs" / "e2e-qp" / "model")
    with pytest.raises(CheckpointError, match="2 runs: block-ap, e2e-qp") as caught:
        eqat_mm.load(tmp_path / "runs")
    assert_four_lines(caught.value)


@pytest.mark.parametrize("tied", [False, True])
def test_on_a_cpu_matrices_stay_in_their_16_bits(pack: Pack, tied: bool) -> None:
    folder, tokens = pack(tie_word_embeddings=tied), torch.tensor([[1, 2, 3]])
    model, wide = eqat_mm.load(folder), eqat_mm.load(folder, dtype="float32")
    for matrix in (model.lm_head.weight, model.get_input_embeddings().weight):
        assert matrix.dtype is torch.bfloat16
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    assert model.model.norm.weight.dtype is model.dtype is torch.float32
    with torch.no_grad():
        assert_close(model(input_ids=tokens).logits, wide(input_ids=tokens).logits, "model")
    assert {type(module) for module in wide.modules()} & {NarrowLinear, NarrowEmbedding} == set()


def test_narrow_matrices_are_cast_with_their_model_and_copied(folder: Path) -> None:
    model, tokens = eqat_mm.load(folder), torch.tensor([[1, 2, 3]])
    assert torch.equal(copy.deepcopy(model)(input_ids=tokens).logits, model(input_ids=tokens).logits)
    wanted = eqat_mm.load(folder, dtype="bfloat16")(input_ids=tokens).logits
    found = nn.Module.to(model, torch.bfloat16)
    assert found.dtype is torch.bfloat16
    assert_close(found(input_ids=tokens).logits, wanted, "model")


def test_gradients_pass_a_narrow_head(folder: Path) -> None:
    tokens, found = torch.tensor([[1, 2, 3]]), []
    for dtype in ("auto", "float32"):
        model = eqat_mm.load(folder, dtype=dtype)
        model(input_ids=tokens, labels=tokens).loss.backward()
        found.append(model.model.layers[0].mlp.up_proj.weight_scale.grad)
    assert_close(*found, "gradient")


def test_a_matrix_that_another_class_shares_is_wide() -> None:
    class Head(nn.Linear):
        pass

    model = tiny_llama(tie_word_embeddings=True)
    model.lm_head.__class__ = Head
    assert not narrow_matrices(model) & {"lm_head.weight", "model.embed_tokens.weight"}
