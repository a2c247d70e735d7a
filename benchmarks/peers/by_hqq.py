"""HQQ: a half-quadratic solver for each linear by itself, without data.

Groups lie along the inputs (`axis=1`), zero points are numbers of 16 bits, rounded to integers at 4 bits only: the
package's defaults.
"""

from __future__ import annotations

import torch
from hqq.core.quantize import BaseQuantizeConfig, Quantizer
from plain_folder import block_linears, job, write


def main() -> None:
    """Quantize the job's model."""
    asked = job()
    config = BaseQuantizeConfig(nbits=asked.bits, group_size=asked.group_size, axis=1)["weight_quant_params"]
    found = {}
    for name, linear in block_linears(asked.load()).items():
        words, meta = Quantizer.quantize(linear.weight.detach(), device="cpu", **config)
        meta |= {key: meta[key].to(torch.float16).float() for key in ("scale", "zero")}
        found[f"{name}.weight"] = Quantizer.dequantize(words, meta | {"compute_dtype": torch.float32})
    write(asked, found, asked.stored_bits(zero_point=16), "hqq")


if __name__ == "__main__":
    main()
