"""Plain `from_pretrained` of transformers, with `import eqat_mm`: packed modules for our folders, and for no others."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from compressed_tensors.quantization import QuantizationConfig
from torch import Tensor, nn

import eqat_mm
from eqat_mm import adapters
from eqat_mm.checkpoint import verify_checkpoint
from eqat_mm.checkpoint.adapters import add_adapters
from eqat_mm.checkpoint.manifest import MANIFEST
from eqat_mm.errors import ConfigError
from eqat_mm.quant.packed_linear import PackedLinear
from eqat_mm.quant.packed_lora import PackedLoRA
from eqat_mm.quant.spec import QuantSpec
from tests.checkpoint.conftest import Pack
from tests.checkpoint.conftest import pack as pack
from tests.checkpoint.conftest import tokens as tokens
from tests.checkpoint.files import assert_four_lines, same_weights, tensors_of
from tests.checkpoint.foreign import logits_of, packed_linears

pytestmark = pytest.mark.filterwarnings("ignore:You passed `quantization_config`", "ignore:`is_gradient_checkpointing`")


def read(folder: Path, **options: Any) -> Any:
    """As anyone reads a language model."""
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **({"dtype": torch.float32} | options))


@pytest.mark.parametrize(
    "spec", [QuantSpec(2, 64), QuantSpec(3, 32, True), QuantSpec(4, -1), QuantSpec(8, 64)], ids=str
)
@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True, "attention_bias": True}], ids=str)
def test_it_gives_what_load_gives(pack: Pack, tokens: Tensor, spec: QuantSpec, changes: dict[str, Any]) -> None:
    model, ours = read(pack(spec, **changes)), eqat_mm.load(pack(spec, **changes))
    assert packed_linears(model).keys() == packed_linears(ours).keys()
    assert torch.equal(logits_of(model, {"input_ids": tokens}), logits_of(ours, {"input_ids": tokens}))
    states = model.state_dict(), ours.state_dict()
    assert all(torch.equal(states[0][name], tensor) for name, tensor in states[1].items())
    assert states[0].keys() == states[1].keys()
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in ours.parameters()]
    assert type(model) is type(ours)
    assert not model.training
    assert not getattr(model, "is_quantized", False)
    assert model.config.to_dict() == ours.config.to_dict() | {"_name_or_path": str(pack(spec, **changes))}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_dtype_is_that_of_what_is_not_quantized(pack: Pack, tokens: Tensor, dtype: torch.dtype) -> None:
    model, ours = read(pack(), dtype=dtype), eqat_mm.load(pack(), dtype=dtype)
    assert torch.equal(logits_of(model, {"input_ids": tokens}), logits_of(ours, {"input_ids": tokens}))
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            assert tensor.dtype is (torch.float32 if name.endswith("weight_scale") else dtype)


@torch.no_grad()
def test_it_saves_a_packed_checkpoint(pack: Pack, tokens: Tensor, tmp_path: Path) -> None:
    model = read(pack())
    model.save_pretrained(tmp_path / "same")
    assert same_weights(pack(), tmp_path / "same")
    for module in packed_linears(model).values():
        module.weight_scale.mul_(2)
    model.save_pretrained(tmp_path / "saved")
    verify_checkpoint(tmp_path / "saved")
    again = read(tmp_path / "saved")
    assert torch.equal(logits_of(again, {"input_ids": tokens}), logits_of(model, {"input_ids": tokens}))


def test_it_is_trained_tuned_and_switched_like_a_loaded_one(pack: Pack, tokens: Tensor, tmp_path: Path) -> None:
    model = read(pack())
    assert len(eqat_mm.train_only(model)) == 14
    logits_sum = model(input_ids=tokens).logits.square().mean()
    logits_sum.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.sub_(parameter.grad * 1e-3)
    moved = adapters.save(model, tmp_path / "moved.safetensors")
    again = read(pack())
    adapters.add(again, moved)
    adapters.switch(again, "moved")
    for module in packed_linears(model).values():
        module.round_scales()
    assert torch.equal(logits_of(again, {"input_ids": tokens}), logits_of(model, {"input_ids": tokens}))


@pytest.mark.parametrize("how", ["variable", "configuration"])
def test_the_stock_way_is_there(pack: Pack, tokens: Tensor, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    options: dict[str, Any] = {}
    if how == "variable":
        monkeypatch.setenv("EQAT_FROM_PRETRAINED", "dense")
    else:
        options["quantization_config"] = transformers.CompressedTensorsConfig(dequantize=True)
    model = read(pack(), **options)
    assert not packed_linears(model)
    assert sum(isinstance(module, nn.Linear) for module in model.modules()) == 15
    assert logits_of(model, {"input_ids": tokens}).isfinite().all()


def test_a_configuration_that_asks_for_nothing_changes_nothing(pack: Pack) -> None:
    assert len(packed_linears(read(pack(), quantization_config=transformers.CompressedTensorsConfig()))) == 14


def test_folders_of_others_are_read_as_ever(pack: Pack, tmp_path: Path) -> None:
    shutil.copytree(pack(QuantSpec(4, 32, True)), tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config["quantization_config"] = QuantizationConfig.model_validate(config["quantization_config"]).model_dump()
    (tmp_path / "model" / "config.json").write_text(json.dumps(config, default=str))
    (tmp_path / "model" / MANIFEST).unlink()
    assert not packed_linears(read(tmp_path / "model"))


def test_a_folder_without_its_manifest(pack: Pack, tokens: Tensor, tmp_path: Path) -> None:
    shutil.copytree(pack(), tmp_path / "model")
    (tmp_path / "model" / MANIFEST).unlink()
    model = read(tmp_path / "model")
    assert torch.equal(logits_of(model, {"input_ids": tokens}), logits_of(eqat_mm.load(pack()), {"input_ids": tokens}))
    model.save_pretrained(tmp_path / "saved")
    assert {name: tensor.dtype for name, tensor in tensors_of(tmp_path / "saved").items() if "scale" in name} == {
        name: tensor.dtype for name, tensor in tensors_of(pack()).items() if "scale" in name
    }
    assert torch.equal(
        logits_of(read(tmp_path / "saved"), {"input_ids": tokens}), logits_of(model, {"input_ids": tokens})
    )


def test_low_rank_adapters_come_along_and_others_go_on(pack: Pack, tokens: Tensor, tmp_path: Path) -> None:
    model = eqat_mm.load(pack())
    add_adapters(model, rank=4, alpha=8, seed=0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(tmp_path / "saved")
    again = read(tmp_path / "saved")
    assert torch.equal(logits_of(again, {"input_ids": tokens}), logits_of(model, {"input_ids": tokens}))


def test_adapters_that_peft_trained_on_full_precision(pack: Pack, tokens: Tensor, tmp_path: Path) -> None:
    dense = transformers.AutoModelForCausalLM.from_pretrained(pack().parent / "full", dtype=torch.float32)
    adapted: Any = peft.get_peft_model(dense, peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj"]))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if ".lora_B." in name:
                nn.init.normal_(parameter, std=0.2)
    adapted.save_pretrained(tmp_path / "lora")
    base = read(pack())
    plain = logits_of(base, {"input_ids": tokens})
    model: Any = peft.PeftModel.from_pretrained(base, str(tmp_path / "lora"))
    assert sum(isinstance(module, PackedLoRA) for module in model.modules()) == 4
    assert not torch.equal(logits_of(model, {"input_ids": tokens}), plain)
    for path, module in model.named_modules():
        if isinstance(module, PackedLoRA):
            stored = adapted.get_submodule(path).lora_B["default"].weight
            assert torch.equal(module.lora_B["default"].weight, stored)
    with model.disable_adapter():
        assert torch.equal(logits_of(model, {"input_ids": tokens}), plain)
    read(pack()).load_adapter(str(tmp_path / "lora"))  # transformers' own door


@pytest.mark.parametrize("first", ["eqat_mm", "transformers"])
def test_in_a_process_of_its_own(pack: Pack, first: str) -> None:
    second = {"eqat_mm": "transformers", "transformers": "eqat_mm"}[first]
    program = (
        f"import {first}, {second}\n"
        f"model = transformers.AutoModelForCausalLM.from_pretrained({str(pack())!r})\n"
        "print(sum(type(each).__name__ == 'PackedLinear' for each in model.modules()))\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "EQAT_FROM_PRETRAINED"}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=300, env=environment, check=True
    )
    assert done.stdout.strip() == "14"


def test_on_named_devices(pack: Pack, tokens: Tensor) -> None:
    model = read(pack(), device_map={"": "cpu"})
    assert torch.equal(logits_of(model, {"input_ids": tokens}), logits_of(eqat_mm.load(pack()), {"input_ids": tokens}))
    assert all(isinstance(module, PackedLinear) for module in packed_linears(model).values())


@pytest.mark.parametrize(
    "where", ["auto", "cpu", {"": "cpu"}, {"model": "cpu", "lm_head": torch.device("cpu")}], ids=str
)
def test_load_takes_devices(pack: Pack, tokens: Tensor, where: Any) -> None:
    model = eqat_mm.load(pack(), device_map=where)
    assert torch.equal(logits_of(model, {"input_ids": tokens}), logits_of(eqat_mm.load(pack()), {"input_ids": tokens}))


@pytest.mark.parametrize("where", [{"model": "cpu"}, {"": "disk"}, {"": "nowhere"}, {"": 99}, "nowhere"], ids=str)
def test_devices_that_cannot_be(pack: Pack, where: Any) -> None:
    with pytest.raises(ConfigError, match="device_map") as raised:
        eqat_mm.load(pack(), device_map=where)
    assert_four_lines(raised.value)
