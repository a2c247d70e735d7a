"""Every training loss, each in one function."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

IGNORED = -100
"""Label of positions that do not count, as in transformers."""


def block_loss(output: Tensor, target: Tensor) -> Tensor:
    """Return the mean squared error between two blocks' hidden states (EfficientQAT, Block-AP).

    Args:
        output: of the quantized block, float [B, T, H].
        target: of the full-precision block, float [B, T, H].
    """
    return functional.mse_loss(output.float(), target.float())


def next_token_cross_entropy(logits: Tensor, labels: Tensor, count: Tensor | float | None = None) -> Tensor:
    """Return the mean cross entropy of the next token.

    Args:
        logits: float [B, T, V].
        labels: int64 [B, T]; position t is predicted from t - 1; `IGNORED` positions do not count.
        count: number of labels to average over, where the batch is a part of a larger one.
    """
    wanted, keep = _next_labels(labels)
    total = functional.cross_entropy(logits[:, :-1][keep].float(), wanted, reduction="sum")
    return total / (keep.sum() if count is None else count)


def next_token_kl(
    logits: Tensor, teacher_logits: Tensor, labels: Tensor, count: Tensor | float | None = None
) -> Tensor:
    """Return the mean KL(teacher || student) over the vocabulary, in nats per predicted token.

    Args:
        logits: student's, float [B, T, V].
        teacher_logits: float [B, T, V].
        labels: int64 [B, T]; decides which positions count, as in `next_token_cross_entropy`.
        count: as there.
    """
    _, keep = _next_labels(labels)
    student = functional.log_softmax(logits[:, :-1][keep].float(), dim=-1)
    with torch.no_grad():
        teacher = functional.log_softmax(teacher_logits[:, :-1][keep].float(), dim=-1)
    total = functional.kl_div(student, teacher, log_target=True, reduction="sum")
    return total / (keep.sum() if count is None else count)


def _next_labels(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the labels that count, flat, and the mask [B, T-1] of where they stand."""
    following = labels[:, 1:]
    keep = following != IGNORED
    return following[keep], keep
