"""Logits and greedy tokens of a folder from transformers, and what it saves, read again: FOLDER INPUTS OUTPUTS [save].

INPUTS and OUTPUTS are safetensors files: `input_ids` [B, T], and `pixel_values` and the like where there are images;
`logits` float32 [B, T, V], `generated`, the first row and what follows it, and with `save` `reloaded`, the largest
difference of the logits of the first row after save and load, -1 where it cannot save. eqat_mm is out of reach of this
process.
"""

from __future__ import annotations

import sys
from typing import Any

for name in ("eqat_mm", "eqat_kernels", "llava_adapters"):
    sys.modules[name] = None  # type: ignore[assignment]

import torch
import transformers
from safetensors.torch import load_file, save_file

NEW = 8


@torch.no_grad()
def main(folder: str, inputs: str, outputs: str, *save: str) -> None:
    torch.set_num_threads(1)
    given = load_file(inputs)
    images = {name: value for name, value in given.items() if name != "input_ids"}
    rows = [{"input_ids": row[None]} | images for row in given["input_ids"]]
    model = loaded(folder)
    logits = torch.cat([model(**row).logits.float() for row in rows])
    prompt = rows[0]["input_ids"] if images else rows[0]["input_ids"][:, :24]
    written = model.generate(input_ids=prompt, **images, max_new_tokens=NEW, do_sample=False)
    found = {"logits": logits, "generated": written[0].clone()}
    if save:
        found["reloaded"] = reloaded(model, rows[0], logits[:1], f"{outputs}.saved")
    save_file(found, outputs)


def reloaded(model: Any, row: dict[str, torch.Tensor], logits: torch.Tensor, folder: str) -> torch.Tensor:
    try:
        model.save_pretrained(folder)
    except Exception as error:  # noqa: BLE001 - whatever a release makes of it
        print(error, file=sys.stderr)
        return torch.tensor([-1.0])
    return (loaded(folder)(**row).logits.float() - logits).abs().max().reshape(1)


def loaded(folder: str) -> Any:
    config = transformers.AutoConfig.from_pretrained(folder)
    auto = "AutoModelForImageTextToText" if hasattr(config, "vision_config") else "AutoModelForCausalLM"
    return getattr(transformers, auto).from_pretrained(folder, torch_dtype=torch.float32).eval()


if __name__ == "__main__":
    main(*sys.argv[1:])
