"""Dense packing: code i of a row occupies bits [i*N, (i+1)*N) of a little-endian bit stream.

The stream is cut into 32-bit words, so 3-bit codes really take 3 bits (32 codes in three words). A row
is padded with zero bits to a whole word. The same formula serves 2, 3, 4 and 8 bits: the smallest run of
codes that fills whole bytes is 4, 8, 2 and 1 codes in 1, 3, 1 and 1 bytes.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from eqat_kernels.layout import words_for

_RUN = {2: (4, 1), 3: (8, 3), 4: (2, 1), 8: (1, 1)}
"""bits -> (codes per run, bytes per run)"""

if sys.byteorder != "little":  # pragma: no cover
    raise ImportError("eqat_kernels packs codes by viewing words as bytes and needs a little-endian machine")


def pack(codes: Tensor, bits: int) -> Tensor:
    """See `eqat_kernels.pack`."""
    per_run, run_bytes = _RUN[bits]
    length = codes.shape[-1]
    words = words_for(length, bits)
    runs = -(-length // per_run)
    runs_of_codes = _pad_last(codes, runs * per_run).unflatten(-1, (runs, per_run))
    stream = torch.zeros(*codes.shape[:-1], runs, dtype=torch.int32, device=codes.device)
    for i in range(per_run):
        stream |= runs_of_codes[..., i].to(torch.int32) << (i * bits)
    run_as_bytes = stream.unsqueeze(-1).view(torch.uint8)[..., :run_bytes]
    # `contiguous` would keep odd strides of dimensions of size one, which `view` refuses; a copy has plain ones
    row_as_bytes = _pad_last(run_as_bytes.flatten(-2), words * 4).clone(memory_format=torch.contiguous_format)
    return row_as_bytes.view(torch.int32)


def unpack(words: Tensor, bits: int, length: int) -> Tensor:
    """See `eqat_kernels.unpack`."""
    per_run, run_bytes = _RUN[bits]
    runs = -(-length // per_run)
    # the last run may end before the last word, or reach beyond it; the extra axis has stride 1, as `view` requires
    row_as_bytes = words.contiguous().unsqueeze(-1).view(torch.uint8).flatten(-2)
    stream = _pad_last(row_as_bytes, runs * run_bytes)
    if run_bytes > 1:
        triples = stream.unflatten(-1, (runs, run_bytes)).to(torch.int32)
        stream = triples[..., 0] | (triples[..., 1] << 8) | (triples[..., 2] << 16)
    mask = (1 << bits) - 1
    codes = torch.empty(*words.shape[:-1], runs, per_run, dtype=torch.uint8, device=words.device)
    for i in range(per_run):
        codes[..., i] = (stream >> (i * bits)) & mask
    return codes.flatten(-2)[..., :length]


def _pad_last(tensor: Tensor, length: int) -> Tensor:
    """Bring the last dimension to `length`: zeros are appended, or the end is cut off."""
    missing = length - tensor.shape[-1]
    return tensor if missing == 0 else torch.nn.functional.pad(tensor, (0, missing))
