"""Our folders as transformers with compressed-tensors reads them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

import eqat_mm
from eqat_mm.blocks.arch import Inputs, set_submodule
from eqat_mm.checkpoint import read_manifest
from eqat_mm.quant.packed_linear import PackedLinear
from eqat_mm.quant.spec import QuantSpec
from eqat_mm.runtime.files import read_json
from eqat_mm.runtime.stock import stock_reader
from llava_adapters import arch_for
from tests.tolerances import assert_close


@torch.no_grad()
def logits_of(model: nn.Module, inputs: Inputs) -> Tensor:
    logits: Tensor = model(**inputs).logits
    return logits


def foreign(folder: Path) -> PreTrainedModel:
    """Load as those do who have not imported this package."""
    auto = getattr(transformers, arch_for(read_manifest(folder).arch).auto_class)
    with stock_reader():
        model: PreTrainedModel = auto.from_pretrained(folder, dtype=torch.float32)
    return model


def packed_linears(model: nn.Module) -> dict[str, PackedLinear]:
    return {path: module for path, module in model.named_modules() if isinstance(module, PackedLinear)}


def assert_read_alike(folder: Path, spec: QuantSpec, inputs: Inputs) -> None:
    """Weights must agree bit for bit, and with their linears our model must give their logits exactly.

    What the configuration has dequantized while it is read is in the dtype of the scales (see
    `eqat_mm.checkpoint.layout.quantization_config`); other folders are decompressed in float32.
    """
    rounded = read_json(folder / "config.json")["quantization_config"].get("dequantize", False)
    ours, theirs = eqat_mm.load(folder, dtype="float32"), foreign(folder)
    their_logits = logits_of(theirs, inputs)
    assert their_logits.abs().max() > 0.5
    dtype = spec.storage_dtype if rounded else torch.float32
    assert_close(logits_of(ours, inputs), their_logits, "model", dtype)
    linears = packed_linears(ours)
    assert len(linears) == 14
    for path, linear in linears.items():
        weight = theirs.get_parameter(f"{path}.weight")
        assert torch.equal(weight, linear.dequantize(dtype).float())
        set_submodule(ours, path, theirs.get_submodule(path))
    assert torch.equal(logits_of(ours, inputs), their_logits)


SCRIPT = """
import sys
sys.modules["eqat_mm"] = sys.modules["eqat_kernels"] = sys.modules["llava_adapters"] = None
import torch, transformers
from safetensors.torch import load_file, save_file
torch.set_num_threads(1)
folder, auto_class, inputs, logits = sys.argv[1:]
model = getattr(transformers, auto_class).from_pretrained(folder, dtype=torch.float32)
with torch.no_grad():
    save_file({"logits": model(**load_file(inputs)).logits}, logits)
"""


def logits_of_a_stranger(folder: Path, auto_class: str, inputs: Inputs, scratch: Path) -> Tensor:
    """Return the logits of a model that another process loads with transformers, without this package."""
    save_file(inputs, scratch / "inputs")
    command = [sys.executable, "-W", "error", "-c", SCRIPT]
    paths = [str(folder), auto_class, str(scratch / "inputs"), str(scratch / "logits")]
    done = subprocess.run(command + paths, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return load_file(scratch / "logits")["logits"]
