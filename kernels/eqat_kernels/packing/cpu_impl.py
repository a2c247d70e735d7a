"""Dense packing in C."""

from __future__ import annotations

import torch
from torch import Tensor

from eqat_kernels.cpu_library import call
from eqat_kernels.layout import words_for


def pack(codes: Tensor, bits: int) -> Tensor:
    """See `eqat_kernels.pack`."""
    length = codes.shape[-1]
    rows = codes.to(torch.uint8).reshape(-1, length).contiguous()
    words = torch.empty(rows.shape[0], words_for(length, bits), dtype=torch.int32)
    call("pack", bits, rows, words, rows.shape[0], length, words.shape[1])
    return words.view(*codes.shape[:-1], words.shape[1])


def unpack(words: Tensor, bits: int, length: int) -> Tensor:
    """See `eqat_kernels.unpack`."""
    rows = words.reshape(-1, words.shape[-1]).contiguous()
    codes = torch.empty(rows.shape[0], length, dtype=torch.uint8)
    call("unpack", bits, rows, codes, rows.shape[0], length, rows.shape[1])
    return codes.view(*words.shape[:-1], length)
