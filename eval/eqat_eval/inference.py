"""The state a model is evaluated in: eval mode, no autograd, everything put back afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """Run the body in `torch.inference_mode` with `model` in eval mode.

    The training flag is restored module by module, also after an exception: a model whose vision
    tower is frozen in eval mode while the rest trains comes back exactly so.
    """
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module, training in flags:
            module.training = training
