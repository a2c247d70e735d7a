"""Logits and greedy tokens of an exported folder from mlx-lm, and for a LLaVA from mlx-vlm: FOLDER INPUTS OUTPUTS.

INPUTS and OUTPUTS are safetensors files: `input_ids` [B, T], and `pixel_values` where there are images; `logits`
float32 [B, T, V] and `generated`, the first row and what follows it. Everything is computed in float32, which holds the
numbers of the folder, so that no rounding of activations hides a difference. eqat_mm is out of reach of this process.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx

NEW = 8


def main(folder: Path, inputs: str, outputs: str) -> None:
    given = mx.load(inputs, format="safetensors")
    config = json.loads((folder / "config.json").read_text())
    forward = _vlm(folder, given) if "vision_config" in config else _lm(folder)
    logits = [forward(row[None]) for row in given["input_ids"]]
    row = given["input_ids"][:1, : _prompt(given)]
    for _ in range(NEW):
        row = mx.concatenate([row, mx.argmax(forward(row)[:, -1:], axis=-1)], axis=1)
    found = {"logits": mx.concatenate(logits), "generated": row[0].astype(mx.int64)}
    mx.save_safetensors(outputs, found)
    Path(f"{outputs}.safetensors").rename(outputs)  # it adds the ending itself


def _prompt(given: dict[str, Any]) -> int:
    return int(given["input_ids"].shape[1]) if "pixel_values" in given else 24


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
    sys.modules |= dict.fromkeys(("eqat_mm", "eqat_kernels", "llava_adapters"))  # type: ignore[arg-type]
    main(Path(sys.argv[1]), *sys.argv[2:])
