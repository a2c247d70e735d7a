"""What a processor returns: rows with an entry for each token, and tensors that belong to images.

Which is which follows from names and shapes, the same for every processor. Rows are padded and cut as token ids are;
the rest is joined, that of all samples in order.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from eqat_mm.errors import ConfigError

REPLACED = "text_replacement_offsets"
"""What a processor says of its image tokens, in dictionaries."""

OFFSETS = "offset_mapping"
_OF_IMAGES = ("pixel_", "image_")
_NO_INPUT = ("labels", "special_tokens_mask")
"""What is no input of a model in use."""


def is_row(name: str, value: Tensor, tokens: int) -> bool:
    """Return whether a tensor of a sample has an entry for each of its tokens."""
    return value.dim() > 0 and len(value) == tokens and not name.startswith(_OF_IMAGES)


def rows_of(sample: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a sample with an entry for each token, [T, ...]."""
    tokens = len(sample["input_ids"])
    return {name: value for name, value in sample.items() if is_row(name, value, tokens)}


def images_of(sample: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a sample that belong to its images, first axis images or what is made of them."""
    rows = rows_of(sample)
    return {name: value for name, value in sample.items() if name not in rows}


def alone(sample: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a batch of one sample: rows get an axis of samples."""
    rows = rows_of(sample)
    return {name: value.unsqueeze(0) if name in rows else value for name, value in sample.items()}


def taken_apart(found: Mapping[str, Any], processor: str) -> dict[str, Any]:
    """Return what a processor made of one text: rows without their axis of samples, tensors of images as they are.

    Args:
        found: what it returned.
        processor: its name, for messages.

    Returns:
        int64 [T, ...] of tokens, tensors of images, and `text_replacement_offsets` where it is there.

    Raises:
        ConfigError: something is neither a tensor nor numbers in lists of one length.
    """
    tokens = len(found["input_ids"][0])
    kept = {name: value for name, value in found.items() if name not in (*_NO_INPUT, REPLACED)}
    tensors = {name: _tensor(name, value, processor) for name, value in kept.items()}
    rows = {name for name, value in tensors.items() if value.dim() > 1 and is_row(name, value[0], tokens)}
    parts = {name: value[0] if name in rows else value for name, value in tensors.items()}
    return parts | ({REPLACED: found[REPLACED][0]} if found.get(REPLACED) else {})


def _tensor(name: str, value: Any, processor: str) -> Tensor:
    if isinstance(value, Tensor):
        return value
    try:
        return torch.from_numpy(np.asarray(value))  # torch itself is slow with lists
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"processor {processor}",
            f"{name}, which is no tensor ({type(value).__name__} of {type(next(iter(value), None)).__name__})"
            if isinstance(value, list | tuple)
            else f"{name}, a {type(value).__name__}",
            "a processor that returns tensors",
            "quantize this model by text alone: its conversations cannot be put together in batches",
        ) from error
