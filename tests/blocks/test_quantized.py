"""A model that is quantized already is known by config.json and by what its files hold."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from eqat_mm.blocks.source import SINGLE, open_model
from eqat_mm.checkpoint.folders import load_for_inference
from eqat_mm.errors import CheckpointError
from eqat_mm.runtime.files import read_json, write_json
from llava_adapters import arch_for
from tests.checkpoint.files import assert_four_lines
from tests.tiny_model import tiny_llama

CPU = torch.device("cpu")
LLAMA = arch_for("llama")
UP = "model.layers.1.mlp.up_proj"
Tensors = dict[str, Tensor]


def replace(leaf: str, value: Tensor, **beside: Tensor) -> Callable[[Tensors], None]:
    """Return what puts another tensor in the place of a weight, and more beside it."""

    def change(tensors: Tensors) -> None:
        del tensors[f"{UP}.weight"]
        tensors |= {f"{UP}.{name.replace('__', '.')}": tensor for name, tensor in {leaf: value, **beside}.items()}

    return change


def beside(**more: Tensor) -> Callable[[Tensors], None]:
    """Return what adds tensors beside a weight."""
    return lambda tensors: tensors.update({f"{UP}.{name}": tensor for name, tensor in more.items()})


WORDS, SCALES = torch.zeros(16, 64, dtype=torch.int32), torch.ones(2, 128, dtype=torch.float16)
BYTES = torch.zeros(128, 64, dtype=torch.int8)
FORMATS: dict[str, tuple[Callable[[Tensors], None], str]] = {
    "gptq": (replace("qweight", WORDS, qzeros=WORDS, scales=SCALES, g_idx=torch.zeros(64, dtype=torch.int32)), "GPTQ"),
    "awq": (replace("qweight", WORDS, qzeros=WORDS, scales=SCALES), "AWQ"),
    "fp8 of DeepSeek": (replace("weight", BYTES.to(torch.float8_e4m3fn), weight_scale_inv=torch.ones(1, 1)), "fp8"),
    "fp8 of compressed-tensors": (
        replace("weight", BYTES.to(torch.float8_e4m3fn), weight_scale=torch.ones(128, 1)),
        "compressed-tensors",
    ),
    "fp8 without scales": (replace("weight", BYTES.to(torch.float8_e5m2)), "unknown"),
    "int8 of compressed-tensors": (replace("weight", BYTES, weight_scale=SCALES), "compressed-tensors"),
    "pack-quantized": (replace("weight_packed", WORDS, weight_scale=SCALES), "compressed-tensors"),
    "dense, with scales": (beside(weight_scale=SCALES, weight_zero_point=BYTES), "compressed-tensors"),
    "bitsandbytes, 4 bits": (
        replace(
            "weight",
            torch.zeros(4096, 1, dtype=torch.uint8),
            weight__absmax=torch.ones(64),
            weight__quant_map=torch.ones(16),
            weight__quant_state__bitsandbytes__nf4=torch.zeros(90, dtype=torch.uint8),
        ),
        "bitsandbytes",
    ),
    "bitsandbytes, 8 bits": (replace("weight", BYTES, SCB=torch.ones(128)), "bitsandbytes"),
    "MXFP4": (replace("weight_blocks", BYTES.to(torch.uint8), weight_scales=BYTES.to(torch.uint8)), ""),
    "AQLM": (replace("codes", BYTES, codebooks=SCALES, scales=SCALES), ""),
    "a method of tomorrow": (beside(weight_grid=SCALES), ""),
    "whole numbers": (replace("weight", torch.zeros(128, 64, dtype=torch.int32)), "unknown"),
}


def save(folder: Path, change: Callable[[Tensors], object] = lambda _: None, **config: Any) -> Path:
    tiny_llama().save_pretrained(folder)
    tensors = load_file(folder / SINGLE)
    change(tensors)
    save_file({name: value.clone() for name, value in tensors.items()}, folder / SINGLE, metadata={"format": "pt"})
    write_json(folder / "config.json", read_json(folder / "config.json") | config)
    return folder


def refusal(folder: Path) -> str:
    said = []
    for open_it in (lambda: open_model(folder, LLAMA), lambda: load_for_inference(folder, CPU)):
        with pytest.raises(CheckpointError, match="quantized already") as caught:
            open_it()
        assert_four_lines(caught.value)
        assert "unquantized repository" in caught.value.do
        said.append(caught.value.given)
    assert said[0] == said[1]
    return said[0]


@pytest.mark.parametrize("kind", list(FORMATS))
def test_what_the_files_hold_tells(tmp_path: Path, kind: str) -> None:
    change, method = FORMATS[kind]
    said = refusal(save(tmp_path, change))
    assert f"{UP}." in said
    assert method in said.split("(")[0]


def test_the_configuration_names_the_method(tmp_path: Path) -> None:
    change, _ = FORMATS["fp8 of DeepSeek"]
    assert "by fbgemm (" in refusal(save(tmp_path, change, quantization_config={"quant_method": "fbgemm"}))


@pytest.mark.parametrize(
    "entry",
    [
        {"quant_method": "gptq", "bits": 4},
        {"quant_method": "compressed-tensors", "quantization_status": "compressed"},
        {"quant_method": "compressed-tensors"},
        {"bits": 4},
        {},
    ],
    ids=str,
)
@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
def test_a_configuration_that_says_so_over_plain_weights(tmp_path: Path, key: str, entry: Any) -> None:
    assert "in config.json" in refusal(save(tmp_path, **{key: entry}))


@pytest.mark.parametrize("status", ["decompressed", "frozen", "calibration", "initialized"])
def test_a_dense_folder_that_was_decompressed(tmp_path: Path, status: str) -> None:
    """It is read as what it holds: nothing quantizes it again on the way in."""
    from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme, preset_name_to_scheme

    scheme: QuantizationScheme = preset_name_to_scheme("W4A16", ["Linear"])
    entry = QuantizationConfig(config_groups={"group_0": scheme}, quantization_status=status, ignore=["lm_head"])
    save(tmp_path, quantization_config=entry.to_dict())
    stored = load_file(tmp_path / SINGLE)[f"{UP}.weight"]
    assert torch.equal(open_model(tmp_path, LLAMA).source.read(f"{UP}.weight"), stored)
    loaded = load_for_inference(tmp_path, CPU)
    assert torch.equal(loaded.get_parameter(f"{UP}.weight"), stored)
    assert type(loaded.get_submodule(UP)) is torch.nn.Linear
    tokens = torch.arange(12).view(2, 6)
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, tiny_llama().eval()(tokens).logits)


def test_a_bias_that_the_model_lacks_is_no_sign(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    open_model(save(tmp_path, beside(bias=torch.zeros(128))), LLAMA)
    assert f"{UP}.bias" in capsys.readouterr().out
