"""Batches without images, where others have some: all processes must run the same modules at the same time.

What such a batch does not need is run on nothing, and 0 times the result is added to the embedded tokens: at the same
place in the forward as images would be, and in the backward too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from eqat_mm.data.image_text.columns import images_of

Sample = Mapping[str, Tensor]


@contextmanager
def adding_nothing(model: Any, of: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Let the embedded tokens of `model` have 0 times `of(embedded)` added, a number.

    Args:
        model: a transformers model.
        of: runs what must be run.
    """

    def add(module: nn.Module, args: Any, embedded: Tensor) -> Tensor:
        return embedded + of(embedded) * 0.0

    handle = model.get_input_embeddings().register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()


def through(projector: nn.Module) -> Callable[[Tensor], Tensor]:
    """Return what reads every parameter of a projector, which is not called: what it takes is its own affair."""
    parameters = list(projector.parameters())
    return lambda embedded: torch.stack([each.flatten()[0].to(embedded) for each in parameters]).sum()


def seeing(model: Any, image: Sample) -> Callable[[Tensor], Tensor]:
    """Return what runs the vision tower and the projector of a transformers model on an image."""

    def run(embedded: Tensor) -> Tensor:
        found = model.get_image_features(**{name: value.to(embedded.device) for name, value in image.items()})
        return torch.stack([feature.sum() for feature in found.pooler_output]).sum()

    return run


def blank_image(sample: Sample) -> dict[str, Tensor]:
    """Return what a processor makes of the images of a sample, with all pixels zero.

    Args:
        sample: rows of tokens [T], and tensors of images [images, ...].
    """
    images = images_of(sample)
    return {name: torch.zeros_like(value) if value.is_floating_point() else value for name, value in images.items()}
