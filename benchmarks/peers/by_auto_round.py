"""auto-round: rounding and ranges of a block's weights by signed gradients.

`options`: `iters` of a block, `sym` (full-range grid, its default) or not. It takes all windows; the rest is the
package's default.
"""

from __future__ import annotations

import torch
from auto_round import AutoRound
from plain_folder import block_linears, dequantized, job, write
from torch import Tensor, nn
from transformers import AutoTokenizer

BATCH = 8


def main() -> None:
    """Quantize the job's model."""
    asked = job()
    windows = asked.calibration()
    tuner = AutoRound(
        asked.load(),
        AutoTokenizer.from_pretrained(asked.model),
        bits=asked.bits,
        group_size=asked.group_size,
        sym=asked.options["sym"],
        iters=asked.options["iters"],
        nsamples=len(windows),
        seqlen=windows.shape[1],
        batch_size=BATCH,
        dataset=[{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in windows.split(BATCH)],
        device_map="cpu",
        seed=asked.seed,
    )
    model, _ = tuner.quantize()
    found = {f"{name}.weight": _weight(linear, asked.group_size) for name, linear in block_linears(model).items()}
    write(asked, found, asked.stored_bits(0 if asked.options["sym"] else asked.bits), "auto-round")


def _weight(linear: nn.Linear, group_size: int) -> Tensor:
    """Return the weight as the stored integers give it: the tuned one is rounded to the dtype of the tuning."""
    weight = linear.weight.detach().float()
    scale = linear.scale.float().reshape(len(weight), -1)
    zero_point = linear.zp if isinstance(linear.zp, Tensor) else torch.tensor(float(linear.zp))
    zero_point = (
        zero_point.float().expand(scale.numel()).reshape(scale.shape) if zero_point.numel() == 1 else zero_point
    )
    zero_point = zero_point.float().reshape(scale.shape)
    codes = (weight.unflatten(1, (-1, group_size)) / scale.unsqueeze(-1)).round() + zero_point.unsqueeze(-1)
    return dequantized(codes.flatten(1), scale, zero_point)


if __name__ == "__main__":
    main()
