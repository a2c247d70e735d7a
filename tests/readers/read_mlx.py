"""Logits and greedy tokens of folders `--to mlx` from mlx-lm, and of a LLaVA from mlx-vlm.

`jobs.py` says how it is run. Inputs: `input_ids` [B, T], and `pixel_values` where there are images. Outputs:
`logits` float32 [B, T, V], `generated`, what follows the first row up to the token `end`. Everything is computed in
float32, which holds the numbers of the folder, so that no rounding of activations hides a difference.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jobs  # type: ignore[import-not-found]  # beside this file
import mlx.core as mx


def answer(folder: str, inputs: str, outputs: str, end: int) -> None:
    given = mx.load(inputs, format="safetensors")
    config = json.loads((Path(folder) / "config.json").read_text())
    seeing = "vision_config" in config
    forward, more = _vlm(Path(folder), given) if seeing else _lm(Path(folder))
    logits = mx.concatenate([forward(row[None]) for row in given["input_ids"]])
    found = {
        "logits": logits,
        "generated": _written(more, given["input_ids"][:1, : None if seeing else jobs.PROMPT], end),
    }
    mx.save_safetensors(outputs, found)
    Path(f"{outputs}.safetensors").rename(outputs)  # it adds the ending itself


def _written(more: Any, row: Any, end: int) -> Any:
    """Return the most likely tokens behind a row, up to one that ends a text."""
    written: list[int] = []
    while len(written) < jobs.NEW and end not in written:
        written.append(int(mx.argmax(more(row, written)[0, -1])))
    return mx.array(written, dtype=mx.int64)


def _lm(folder: Path) -> tuple[Any, Any]:
    """Return what gives the logits of a row, and those behind a row and what was written since, with a cache."""
    from mlx_lm.models.cache import make_prompt_cache
    from mlx_lm.utils import load_model

    model, _ = load_model(folder)
    model.set_dtype(mx.float32)
    cache = make_prompt_cache(model)
    return model, lambda row, written: model(mx.array([written[-1:]]) if written else row, cache=cache)


def _vlm(folder: Path, given: dict[str, Any]) -> tuple[Any, Any]:
    """Return the same of a model that sees, without a cache: answers are short."""
    from mlx_vlm.utils import load_model

    model = load_model(folder)
    model.set_dtype(mx.float32)

    def forward(row: Any, written: Sequence[int] = ()) -> Any:
        ids = mx.concatenate([row, mx.array([written], dtype=row.dtype)], axis=1) if written else row
        return model(ids, given["pixel_values"], None).logits

    return forward, forward


if __name__ == "__main__":
    jobs.do(answer)
