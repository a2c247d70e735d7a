"""Perplexity on held-out windows, and how far a model's predictions are from a reference model's.

With p the model's next-token distribution and q the reference's, over the T - 1 predicted positions
of each of n windows (tokens = n * (T - 1); nothing is carried from one window to the next):

    perplexity     = exp( mean of -log p(next token) )
    kl             = mean of KL(q || p) = mean of sum_v q_v (log q_v - log p_v)     in nats per token
    top1_agreement = share of positions where argmax p = argmax q
    flips          = share of positions where one of argmax p, argmax q is the next token and the other is not

Perplexity alone can hide damage that changes answers without changing their average likelihood; KL,
agreement and flips see it (Dutta et al., "Accuracy is not all you need", 2024, 2407.09141).

Logits are taken to float32 a few rows at a time (a window of 2048 tokens over 128k words would be
1 GiB per temporary otherwise), sums are float64. A non-finite loss is a result like any other: inf
or nan is reported, never raised.

Shape suffixes: N windows, T tokens per window, B windows of a batch, R rows (positions) of a chunk,
V vocabulary.
"""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from eqat_eval.finite import not_finite
from eqat_eval.inference import inference
from eqat_eval.reference import ReferenceOutputs
from eqat_eval.windows import check_positive, check_windows, row_spans
from eqat_mm.errors import CheckpointError, ConfigError
from eqat_mm.runtime.progress import progress
from eqat_mm.runtime.ranks import ALONE, Ranks

__all__ = ["PerplexityResult", "ReferenceOutputs", "evaluate_perplexity"]


@dataclass(frozen=True)
class PerplexityResult:
    """What `evaluate_perplexity` found.

    Attributes:
        perplexity: exp of the mean negative log-likelihood.
        tokens: predicted positions, n * (T - 1).
        kl: mean KL(reference || model) in nats per token; None without a reference.
        top1_agreement: share of positions with the same most likely token, 0 to 1; None without a
            reference. In bfloat16 equal logits are common, and which of them comes first is chance:
            below 1e-3 of disagreement do not read anything into it.
        flips: share of positions that one of the two models predicts rightly and the other wrongly, 0 to 1; None
            without a reference.
        seconds: wall time, forward passes included.
    """

    perplexity: float
    tokens: int
    kl: float | None
    top1_agreement: float | None
    flips: float | None
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """Return the fields by name."""
        return asdict(self)


def evaluate_perplexity(
    model: PreTrainedModel,
    windows_NT: Tensor,
    *,
    batch_size: int = 1,
    reference: ReferenceOutputs | None = None,
    chunk_rows: int = 128,
    ranks: Ranks = ALONE,
) -> PerplexityResult:
    """Evaluate a causal LM on held-out windows.

    Of several ranks each is given the windows of its share; sums are those of all windows, in their order.

    Args:
        model: called as `model(input_ids=...)` in eval mode; its training flags are restored.
        windows_NT: token ids, int64 [n, T], on any device.
        batch_size: windows per forward pass; one batch of logits is held at a time.
        reference: outputs of the full-precision model on the same windows; adds KL, agreement and flips.
        chunk_rows: positions whose logits are float32 at the same time; memory only, not the result.
        ranks: processes that share the windows; all get the result.

    Raises:
        DataError: windows of a wrong dtype or shape, or ids outside the vocabulary.
        ConfigError: a count below 1, or a reference on other windows or of another vocabulary.
        CheckpointError: the loss or the KL is not finite.
    """
    check_windows(windows_NT, model)
    check_positive("batch_size", batch_size)
    check_positive("chunk_rows", chunk_rows)
    if reference is not None:
        reference.check_same_windows(windows_NT)
    started = time.perf_counter()
    with inference(model):
        own = _sums(model, windows_NT, batch_size, reference, chunk_rows, ranks)
    sums = torch.tensor(ranks.all_of(own), dtype=torch.float64)
    tokens = len(sums) * (windows_NT.shape[1] - 1)
    return _result(_total(sums), tokens, reference is not None, time.perf_counter() - started)


def _total(sums_N4: Tensor) -> list[float]:
    """Add up the sums of all windows, one after the other: so they are the same for any number of ranks."""
    total = torch.zeros(4, dtype=torch.float64)
    for sums in sums_N4:
        total += sums
    return [float(value) for value in total]


def _sums(
    model: PreTrainedModel,
    windows_NT: Tensor,
    batch_size: int,
    reference: ReferenceOutputs | None,
    chunk_rows: int,
    ranks: Ranks,
) -> list[list[float]]:
    """Return for each window the sums over its positions of [negative log-likelihood, KL, agreement, flips]."""
    sums: list[list[float]] = []
    batches = torch.split(windows_NT, batch_size)
    for index, batch_BT in enumerate(progress(batches, what="perplexity", total=len(batches), unit="batch")):
        logits_BTV: Tensor = model(input_ids=batch_BT.to(model.device), use_cache=False).logits
        if reference is not None:
            reference = reference.to(logits_BTV.device)
        for offset, (logits_TV, tokens_T) in enumerate(zip(logits_BTV, batch_BT, strict=True)):
            window = index * batch_size + offset
            found = _window_sums(logits_TV, tokens_T, reference, window, chunk_rows).cpu()
            if not found.isfinite().all():
                raise _spoilt(model, window * ranks.world + ranks.rank, *found.tolist())
            sums.append(found.tolist())
        del logits_BTV, logits_TV  # or the next forward pass would hold two batches of logits
    return sums


def _spoilt(model: PreTrainedModel, window: int, nll: float, kl: float, *_: float) -> CheckpointError:
    name, value = ("KL", kl) if math.isfinite(nll) else ("loss", nll)
    return not_finite(model, f"the {name} of window {window} is {value}")


def _window_sums(
    logits_TV: Tensor, tokens_T: Tensor, reference: ReferenceOutputs | None, window: int, chunk_rows: int
) -> Tensor:
    """Return the sums of `_chunk_sums` over the T - 1 predicted positions of one window, float64 [4]."""
    device = logits_TV.device
    next_T = tokens_T.to(device)[1:]
    sums = torch.zeros(4, dtype=torch.float64, device=device)
    for start, stop in row_spans(len(next_T), chunk_rows):
        expected_RV = None if reference is None else reference.logits(window, start, stop, device)
        sums += _chunk_sums(logits_TV[start:stop], next_T[start:stop], expected_RV)
    return sums


def _chunk_sums(logits_RV: Tensor, next_R: Tensor, reference_RV: Tensor | None) -> Tensor:
    """Return [sum of -log p(next), sum of KL(q || p), positions that agree, that flip], float64 [4]."""
    log_p_RV = logits_RV.float().log_softmax(-1)
    nll = -log_p_RV.gather(-1, next_R[:, None]).double().sum()
    if reference_RV is None:
        return torch.stack([nll, *torch.zeros(3, dtype=nll.dtype, device=nll.device)])
    _check_vocabulary(logits_RV, reference_RV)
    kl_R = _kl(reference_RV.float().log_softmax(-1), log_p_RV)
    said_R, expected_R = logits_RV.argmax(-1), reference_RV.argmax(-1)
    agree_R, flip_R = said_R == expected_R, (said_R == next_R) != (expected_R == next_R)
    return torch.stack([nll, kl_R.sum(), agree_R.double().sum(), flip_R.double().sum()])


def _kl(log_q_RV: Tensor, log_p_RV: Tensor) -> Tensor:
    """Return KL(q || p) per row, float64 [R]; 0 log 0 = 0, so vocabulary masked with -inf is harmless."""
    q_RV = log_q_RV.exp()
    terms_RV = (log_q_RV - log_p_RV).mul_(q_RV).masked_fill_(q_RV == 0, 0.0)
    return terms_RV.sum(-1, dtype=torch.float64)


def _check_vocabulary(logits_RV: Tensor, reference_RV: Tensor) -> None:
    if logits_RV.shape[-1] != reference_RV.shape[-1]:
        raise ConfigError(
            where="reference",
            given=f"{reference_RV.shape[-1]} logits per token, the model has {logits_RV.shape[-1]}",
            allowed="a reference with the same vocabulary",
            do="record the reference from the model that was quantized, with the same embedding size",
        )


def _result(sums: list[float], tokens: int, compared: bool, seconds: float) -> PerplexityResult:
    nll, kl, agree, flips = (value / tokens for value in sums)
    return PerplexityResult(
        perplexity=_perplexity(nll),
        tokens=tokens,
        kl=kl if compared else None,
        top1_agreement=agree if compared else None,
        flips=flips if compared else None,
        seconds=seconds,
    )


def _perplexity(nll: float) -> float:
    value = float(torch.tensor(nll, dtype=torch.float64).exp())
    if math.isfinite(value):
        return value
    raise CheckpointError(
        "evaluation",
        f"a mean loss of {nll:.4g} nats a token",
        "a loss whose perplexity is a finite number: 709 nats at most",
        "take another checkpoint: this one predicts nothing",
    )
