"""Every training loss, each in one function.

Shape letters: B sequences, T tokens, C columns with a prediction that counts, R rows of a chunk, V vocabulary,
H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

IGNORED = -100
"""Label of positions that do not count, as in transformers."""

CHUNK = {"cpu": 1 << 22, "cuda": 1 << 24}
"""Logits taken to float32 at a time. 16 MiB, which a processor's cache holds; on a GPU 64 MiB, for which a kernel takes
several times as long as its launch, and of which a few copies are small beside the logits."""


BlockLoss = Literal["mse", "balanced"]
Loss = Literal["cross-entropy", "kl"]
"""Of a whole model: of the labels, or to the full-precision model's predictions."""

Joined = Callable[[Tensor], Tensor]
"""From one value for each token here to those of all tokens of a batch that is divided among processes."""


def block_loss(
    output_BTH: Tensor,
    target_BTH: Tensor,
    kind: BlockLoss = "mse",
    joined: Joined | None = None,
    weights_BT: Tensor | None = None,
) -> Tensor:
    """Return the mean squared error between two blocks' hidden states (EfficientQAT, Block-AP).

    Args:
        output_BTH: of the quantized block, float.
        target_BTH: of the full-precision block, float.
        kind: `mse`, or `balanced`, which weighs the error of each token by `token_weights` of the target.
        joined: as there.
        weights_BT: how much each token counts besides; 0 leaves it out. None: all count alike.
    """
    output_BTH, target_BTH = output_BTH.float(), target_BTH.float()
    if kind == "balanced":
        counts_BT1 = token_weights(target_BTH, joined, weights_BT)
    elif weights_BT is None:
        return functional.mse_loss(output_BTH, target_BTH)
    else:
        counts_BT1 = weights_BT.unsqueeze(-1)
    error_BTH = counts_BT1 * (output_BTH - target_BTH).square()
    return error_BTH.mean() if weights_BT is None else error_BTH.mean(-1).sum() / weights_BT.sum()


def token_weights(hidden_TH: Tensor, joined: Joined | None = None, weights_T: Tensor | None = None) -> Tensor:
    """Return how much each token counts, min(1, median(e) / e) with e the mean square of its row, [..., T, 1].

    In deep blocks the hidden states of a few tokens (attention sinks) are hundreds of times larger than the rest;
    unweighted, a sum of squares is theirs alone.

    Args:
        hidden_TH: float; the tokens of a batch, or a part of them.
        joined: gives the energies of the whole batch, where this is a part: the median is taken of those.
        weights_T: how much each token counts besides; the median is of those that count at all.
    """
    energy_T1 = hidden_TH.square().mean(-1, keepdim=True).clamp(min=1e-12)
    if weights_T is None:
        whole = energy_T1 if joined is None else joined(energy_T1)
        return (whole.median() / energy_T1).clamp(max=1.0)
    counts_T1 = weights_T.unsqueeze(-1)
    counted_T1 = energy_T1.masked_fill(counts_T1 == 0, torch.nan)
    whole = counted_T1 if joined is None else joined(counted_T1)
    return (whole.nanmedian() / energy_T1).clamp(max=1.0) * counts_T1


def predictions_that_count(labels_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Return where a model must predict, and what.

    Position t is predicted from position t - 1, so logits are needed only in columns whose successor is a label
    in some sequence: the last column never, and the columns of questions and images not either.

    Args:
        labels_BT: int64; `IGNORED` positions do not count.

    Returns:
        columns, int64 [C], for `logits_to_keep` of a transformers model; and the labels that follow them, int64
        [B, C], `IGNORED` where another sequence needs the column.
    """
    following_BT = labels_BT[:, 1:]
    columns = (following_BT != IGNORED).any(0).nonzero().squeeze(-1)
    return columns, following_BT[:, columns]


def cross_entropy(logits_BCV: Tensor, labels_BC: Tensor, count: Tensor | float | None = None) -> Tensor:
    """Return the mean cross entropy of the labels, in nats.

    Args:
        logits_BCV: float.
        labels_BC: int64, the token each row predicts; `IGNORED` ones do not count.
        count: number of labels to average over, where the batch is a part of a larger one.
    """
    return _sum_of_divergences(logits_BCV, None, labels_BC) / _count(labels_BC, count)


def kl_divergence(
    logits_BCV: Tensor, teacher_BCV: Tensor, labels_BC: Tensor, count: Tensor | float | None = None
) -> Tensor:
    """Return the mean KL(teacher || student) over the vocabulary, in nats per token.

    Args:
        logits_BCV: the student's, float.
        teacher_BCV: float; gets no gradient.
        labels_BC: int64; decides which rows count, as in `cross_entropy`.
        count: as there.
    """
    return _sum_of_divergences(logits_BCV, teacher_BCV, labels_BC) / _count(labels_BC, count)


def _count(labels: Tensor, count: Tensor | float | None) -> Tensor | float:
    return (labels != IGNORED).sum() if count is None else count


def _sum_of_divergences(logits: Tensor, teacher: Tensor | None, labels: Tensor) -> Tensor:
    total: Tensor = _Divergence.apply(
        logits.flatten(0, -2), None if teacher is None else teacher.flatten(0, -2), labels.flatten()
    )
    return total


def rows_of_a_chunk(vocabulary: int, device: torch.device) -> int:
    """Return how many rows of logits are taken to float32 at a time."""
    return max(1, CHUNK.get(device.type, CHUNK["cpu"]) // vocabulary)


class _Divergence(torch.autograd.Function):
    """Sum over rows of KL(q || p), p = softmax(logits), q the teacher's softmax or all on the label.

    The gradient is p - q. It is computed in the forward, a few rows at a time (on a CPU while they are in its cache),
    so that no float32 copy of all logits ever exists: one such copy is 1 GiB for 4,096 tokens over 64k words, and an
    ordinary chain of operators makes six.
    """

    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, teacher_NV: Tensor | None, labels_N: Tensor) -> Tensor:
        total = torch.zeros((), dtype=torch.float32, device=logits_NV.device)
        ctx.grad_NV = torch.empty_like(logits_NV) if ctx.needs_input_grad[0] else None
        rows = rows_of_a_chunk(logits_NV.shape[-1], logits_NV.device)
        for at in range(0, len(labels_N), rows):
            part = slice(at, at + rows)
            counts_R1 = (labels_N[part] != IGNORED).unsqueeze(-1)
            log_p_RV = logits_NV[part].float().log_softmax(-1)
            if teacher_NV is None:
                found_R1, difference_RV = _from_label(log_p_RV, labels_N[part].unsqueeze(-1).where(counts_R1, 0))
            else:
                found_R1, difference_RV = _from_teacher(log_p_RV, teacher_NV[part].float().log_softmax(-1))
            total += (found_R1 * counts_R1).sum()
            if ctx.grad_NV is not None:
                torch.mul(difference_RV, counts_R1, out=ctx.grad_NV[part])
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return ctx.grad_NV * grad, None, None


def _from_label(log_p_RV: Tensor, label_R1: Tensor) -> tuple[Tensor, Tensor]:
    """Return KL(q || p) = -log p(label) [R, 1] and p - q, q being all on the label; overwrites `log_p_RV`."""
    found_R1 = -log_p_RV.gather(-1, label_R1)
    return found_R1, log_p_RV.exp_().scatter_add_(-1, label_R1, torch.full_like(found_R1, -1.0))


def _from_teacher(log_p_RV: Tensor, log_q_RV: Tensor) -> tuple[Tensor, Tensor]:
    """Return KL(q || p) [R, 1] and p - q; overwrites both arguments."""
    q_RV = log_q_RV.exp()
    found_R1 = torch.linalg.vecdot(q_RV, log_q_RV.sub_(log_p_RV)).unsqueeze(-1)
    return found_R1, log_p_RV.exp_().sub_(q_RV)
