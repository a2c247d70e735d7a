"""What each peer's script needs: the job, the windows, and a plain folder for the result.

These scripts run in the environment of their peer and import nothing of this project. A job is a JSON file:

    model      folder of the full-precision model
    windows    safetensors file with the tensor `windows`, int64 [n, T]
    output     folder to be made: the model, dequantized, in float32, as any other Hugging Face folder
    facts      JSON file to be written last: `bits_per_weight` as the peer stores them, `versions`
    bits, group_size, seed, and `options` of the peer

A step size counts 16 bits, and is rounded to float16 before weights are dequantized, in whatever dtype it was found.
"""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

SCALE_BITS = 16


@dataclass(frozen=True)
class Job:
    """One model to quantize.

    Attributes:
        model: folder of it.
        windows: file of the calibration windows.
        output: folder for the result.
        facts: file for what is to be said of it.
        bits: of a weight.
        group_size: weights that share a step size.
        seed: of what is drawn.
        options: of the peer.
    """

    model: Path
    windows: Path
    output: Path
    facts: Path
    bits: int
    group_size: int
    seed: int
    options: dict[str, Any]

    def load(self) -> PreTrainedModel:
        """Return the full-precision model, in float32."""
        torch.manual_seed(self.seed)
        return AutoModelForCausalLM.from_pretrained(self.model, dtype=torch.float32)

    def calibration(self) -> Tensor:
        """Return the windows, int64 [n, T]."""
        return load_file(self.windows)["windows"]

    def stored_bits(self, zero_point: int) -> float:
        """Return bits per weight where each group has a step size and a zero point of so many bits."""
        return self.bits + (SCALE_BITS + zero_point) / self.group_size


def job() -> Job:
    """Return the job that the command line names."""
    given = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    paths = {name: Path(given.pop(name)) for name in ("model", "windows", "output", "facts")}
    return Job(**paths, **given)


def block_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """Return the linears of the decoder blocks by name: what everybody here quantizes."""
    return {
        name: module for name, module in model.named_modules() if isinstance(module, nn.Linear) and ".layers." in name
    }


def dequantized(codes: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """Return float32 weights [O, I] of codes [O, I], step sizes and zero points [O, G]."""
    step = scale.to(torch.float16).float().unsqueeze(-1)
    grouped = codes.float().unflatten(1, (scale.shape[1], -1))
    return ((grouped - zero_point.float().unsqueeze(-1)) * step).flatten(1)


def write(job: Job, tensors: dict[str, Tensor], bits_per_weight: float, *packages: str) -> None:
    """Write the source's folder with some of its tensors replaced, then the facts.

    Raises:
        ValueError: a tensor that the source has not, or has in another shape.
    """
    source: dict[str, Tensor] = {}
    for file in sorted(job.model.glob("*.safetensors")):
        source |= load_file(file)
    for name, tensor in tensors.items():
        if name not in source or source[name].shape != tensor.shape:
            raise ValueError(f"{name}: {list(tensor.shape)} is no tensor of {job.model}")
        source[name] = tensor.detach().float().contiguous()
    job.output.mkdir(parents=True, exist_ok=True)
    for file in job.model.iterdir():
        if file.is_file() and ".safetensors" not in file.name:
            shutil.copy(file, job.output)
    save_file(source, job.output / "model.safetensors", metadata={"format": "pt"})
    found = {name: version(name) for name in ("torch", "transformers", *packages)}
    facts = {"bits_per_weight": bits_per_weight, "versions": found}
    job.facts.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
