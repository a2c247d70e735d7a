"""Logits and greedy tokens of an exported folder: FOLDER INPUTS OUTPUTS [gptqmodel | transformers].

INPUTS and OUTPUTS are safetensors files: `input_ids` [B, T], and `pixel_values` where there are images; `logits`
float32 [B, T, V] and `generated`, the first row and what follows it. eqat_mm is out of reach of this process.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import torch
from safetensors.torch import load_file, save_file

NEW = 8


@torch.no_grad()
def main(folder: str, inputs: str, outputs: str, reader: str = "gptqmodel") -> None:
    torch.set_num_threads(1)
    os.environ["TORCHDYNAMO_DISABLE"] = "1"  # gptqmodel would compile for minutes
    given = load_file(inputs)
    model = {"gptqmodel": _gptqmodel, "transformers": _transformers}[reader](folder)
    images = {name: value for name, value in given.items() if name != "input_ids"}
    rows = [{"input_ids": row[None]} | images for row in given["input_ids"]]
    logits = torch.stack([model(**row).logits[0].float() for row in rows])
    prompt = rows[0]["input_ids"] if images else rows[0]["input_ids"][:, :24]
    written = model.generate(input_ids=prompt, **images, max_new_tokens=NEW, do_sample=False)
    save_file({"logits": logits, "generated": written[0].clone()}, outputs)


def _gptqmodel(folder: str) -> Any:
    from gptqmodel import BACKEND, GPTQModel

    return GPTQModel.load(folder, backend=BACKEND.GPTQ_TORCH, device="cpu", dtype=torch.float16).model


def _transformers(folder: str) -> Any:
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder)
    auto = "AutoModelForImageTextToText" if hasattr(config, "vision_config") else "AutoModelForCausalLM"
    own = transformers.GPTQConfig(config.quantization_config["bits"], backend="gptq_torch")
    settings = {"dtype": torch.float16, "device_map": "cpu", "quantization_config": own}
    return getattr(transformers, auto).from_pretrained(folder, **settings).eval()


if __name__ == "__main__":
    sys.modules |= dict.fromkeys(("eqat_mm", "eqat_kernels", "llava_adapters"))  # type: ignore[arg-type]
    main(*sys.argv[1:])
