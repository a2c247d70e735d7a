"""Matrices that stay in the 16 bits of their file, in a model that computes in float32.

A float32 copy of embedding, head and vision tower is twice as large as what is stored, and more than all codes of a
small model. Each 16-bit number is a float32 number, so results are those of the copy but for the order of sums.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from eqat_kernels import narrow_linear

HALVES = (torch.bfloat16, torch.float16)


class NarrowLinear(nn.Linear):
    """A linear with a 16-bit weight [O, I] and a float32 bias; it computes in the dtype of its input."""

    def forward(self, x: Tensor) -> Tensor:
        """Return x @ W.T + bias, [..., I] -> [..., O]."""
        if self.weight.dtype not in HALVES or self.weight.dtype is x.dtype:  # cast behind loading
            return super().forward(x)
        return narrow_linear(x, self.weight, self.bias)


class NarrowEmbedding(nn.Embedding):
    """An embedding with a 16-bit weight [V, D]; its rows become `like.dtype`, which `Module.to` casts as all else."""

    like: Tensor

    def forward(self, ids: Tensor) -> Tensor:
        """Return the rows of `ids`, [..., D]."""
        return super().forward(ids).to(self.like.dtype)


def narrow_matrices(model: PreTrainedModel) -> set[str]:
    """Return the names of the weights that `compute_wide` knows how to use in 16 bits.

    They are those of plain linears and of the input embedding, unless a module of another class shares one.
    """
    embedding = model.get_input_embeddings()
    plain = {
        f"{path}.weight"
        for path, module in model.named_modules()
        if type(module) is nn.Linear or (module is embedding and type(module) is nn.Embedding)
    }
    ties = (model.all_tied_weights_keys or {}).items()
    return plain - {name for pair in ties for name in pair if not plain.issuperset(pair)}


def compute_wide(model: nn.Module, dtype: torch.dtype) -> None:
    """Let every plain linear and embedding with a 16-bit weight compute in `dtype` around it."""
    for module in model.modules():
        if type(module) is nn.Linear and module.weight.dtype in HALVES:
            module.__class__ = NarrowLinear
        elif type(module) is nn.Embedding and module.weight.dtype in HALVES:
            module.__class__ = NarrowEmbedding
            module.register_buffer("like", torch.empty(0, dtype=dtype), persistent=False)


def computed_dtype(model: nn.Module) -> torch.dtype | None:
    """Return the dtype in which a model with a narrow embedding computes, None of another."""
    return next((module.like.dtype for module in model.modules() if isinstance(module, NarrowEmbedding)), None)
