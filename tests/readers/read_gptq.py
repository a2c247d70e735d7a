"""Logits and greedy tokens of folders `--to gptq` from gptqmodel, or with the word `transformers` from that.

`jobs.py` says how it is run. Inputs: `input_ids` [B, T], and `pixel_values` where there are images. Outputs: `logits`
float32 [B, T, V], `generated`, what follows the first row.
"""

from __future__ import annotations

import os
from typing import Any

import jobs  # type: ignore[import-not-found]  # beside this file
import torch
from safetensors.torch import load_file, save_file


@torch.no_grad()
def answer(reader: str = "gptqmodel", *, folder: str, inputs: str, outputs: str) -> None:
    given = load_file(inputs)
    model = {"gptqmodel": _gptqmodel, "transformers": _transformers}[reader](folder)
    images = {name: value for name, value in given.items() if name != "input_ids"}
    rows = [{"input_ids": row[None]} | images for row in given["input_ids"]]
    logits = torch.stack([model(**row).logits[0].float() for row in rows])
    prompt = rows[0]["input_ids"] if images else rows[0]["input_ids"][:, : jobs.PROMPT]
    written = model.generate(input_ids=prompt, **images, max_new_tokens=jobs.NEW, do_sample=False)
    save_file({"logits": logits, "generated": written[0, prompt.shape[1] :].clone()}, outputs)


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
    torch.set_num_threads(1)
    os.environ["TORCHDYNAMO_DISABLE"] = "1"  # gptqmodel would compile for minutes
    jobs.do(answer)
