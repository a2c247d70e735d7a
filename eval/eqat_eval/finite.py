"""Predictions that are not finite: an evaluation ends with what is wrong, instead of a NaN."""

from __future__ import annotations

from itertools import chain

import torch
from torch import nn
from transformers import LogitsProcessor

from eqat_mm.errors import CheckpointError


def not_finite(model: nn.Module, found: str) -> CheckpointError:
    """Return the error of a model whose predictions are not finite, with the first of its tensors that is not.

    Args:
        model: whose parameters and buffers are looked through.
        found: what is not finite, and where.
    """
    where = str(getattr(model, "name_or_path", "") or type(model).__name__)
    tensors = chain(model.named_parameters(), model.named_buffers())
    name = next((name for name, tensor in tensors if not torch.isfinite(tensor).all()), None)
    if name is None:
        return CheckpointError(
            where,
            f"{found}; all weights are finite",
            "a model whose predictions are finite numbers",
            "compute in float32 (--dtype float32); if that is no cure, the weights are too large: quantize again",
        )
    return CheckpointError(
        where,
        f"{found}; {name} holds NaN or infinity",
        "a model whose weights are finite numbers",
        "fetch the model again, or quantize or train it again from a sound one",
    )


def predicts(logits: torch.Tensor) -> bool:
    """Whether every row of logits [..., V] is a prediction; single tokens may be ruled out with -inf."""
    return bool(logits.amax(-1).isfinite().all())


class RequireFinite(LogitsProcessor):
    """Ends a generation at the first prediction that is not finite.

    Args:
        model: that generates.

    Raises:
        CheckpointError: when it is called with such a prediction.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Return `scores` [B, V] as they are."""
        if not predicts(scores):
            raise not_finite(self._model, "predictions of the next token that are not finite")
        return scores
