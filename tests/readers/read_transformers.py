"""Logits and greedy tokens of folders from transformers, and what it saves, read again (`jobs.py` says how it is run).

Inputs: `input_ids` [B, T], and `pixel_values` and the like where there are images. Outputs: `logits` float32 [B, T, V],
`generated`, what follows the first row, and where a job has `save`, `reloaded`, the largest difference of the
logits of the first row after save and load, -1 where it cannot.
"""

from __future__ import annotations

import shutil
import sys
from typing import Any

import jobs  # type: ignore[import-not-found]  # beside this file
import torch
import transformers
from safetensors.torch import load_file, save_file


@torch.no_grad()
def answer(folder: str, inputs: str, outputs: str, save: bool = False) -> None:
    given = load_file(inputs)
    images = {name: value for name, value in given.items() if name != "input_ids"}
    rows = [{"input_ids": row[None]} | images for row in given["input_ids"]]
    model = loaded(folder)
    logits = torch.cat([model(**row).logits.float() for row in rows])
    prompt = rows[0]["input_ids"] if images else rows[0]["input_ids"][:, : jobs.PROMPT]
    written = model.generate(input_ids=prompt, **images, max_new_tokens=jobs.NEW, do_sample=False)
    found = {"logits": logits, "generated": written[0, prompt.shape[1] :].clone()}
    if save:
        found["reloaded"] = reloaded(model, rows[0], logits[:1], f"{outputs}.saved")
    save_file(found, outputs)


def reloaded(model: Any, row: dict[str, torch.Tensor], logits: torch.Tensor, folder: str) -> torch.Tensor:
    try:
        model.save_pretrained(folder)
        again = loaded(folder)
    except Exception as error:  # noqa: BLE001 - whatever a release makes of it
        print(error, file=sys.stderr)
        return torch.tensor([-1.0])
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return (again(**row).logits.float() - logits).abs().max().reshape(1)


def loaded(folder: str) -> Any:
    config = transformers.AutoConfig.from_pretrained(folder)
    auto = "AutoModelForImageTextToText" if hasattr(config, "vision_config") else "AutoModelForCausalLM"
    return getattr(transformers, auto).from_pretrained(folder, torch_dtype=torch.float32).eval()


if __name__ == "__main__":
    torch.set_num_threads(1)
    jobs.do(answer)
