"""Logits and greedy tokens of folders `--to mlx` from mlx-lm, and of a LLaVA from mlx-vlm.

`jobs.py` says how it is run. Inputs: `input_ids` [B, T], and `pixel_values` where there are images. Outputs:
`logits` float32 [B, T, V], `generated`, what follows the first row. Everything is computed in float32, which holds the
numbers of the folder, so that no rounding of activations hides a difference.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jobs  # type: ignore[import-not-found]  # beside this file
import mlx.core as mx


def answer(folder: str, inputs: str, outputs: str) -> None:
    given = mx.load(inputs, format="safetensors")
    config = json.loads((Path(folder) / "config.json").read_text())
    forward = _vlm(Path(folder), given) if "vision_config" in config else _lm(Path(folder))
    logits = [forward(row[None]) for row in given["input_ids"]]
    row = given["input_ids"][:1] if "pixel_values" in given else given["input_ids"][:1, : jobs.PROMPT]
    begin = row.shape[1]
    for _ in range(jobs.NEW):
        row = mx.concatenate([row, mx.argmax(forward(row)[:, -1:], axis=-1)], axis=1)
    found = {"logits": mx.concatenate(logits), "generated": row[0, begin:].astype(mx.int64)}
    mx.save_safetensors(f"{outputs}.partial", found)  # it adds an ending itself
    Path(f"{outputs}.partial.safetensors").rename(outputs)


def _lm(folder: Path) -> Any:
    from mlx_lm.utils import load_model

    model, _ = load_model(folder)
    model.set_dtype(mx.float32)
    return model


def _vlm(folder: Path, given: dict[str, Any]) -> Any:
    from mlx_vlm.utils import load_model

    model = load_model(folder)
    model.set_dtype(mx.float32)
    return lambda row: model(row, given.get("pixel_values"), None).logits


if __name__ == "__main__":
    jobs.do(answer)
