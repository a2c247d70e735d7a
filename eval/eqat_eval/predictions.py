"""What a model predicts where the right answer to a question stands, and how far that is from a reference's.

With p the model's next-token distribution and q the reference's, at each token of the right answer, its end token
included, given the tokens before it:

    nll = sum of -log p(token), of one answer, in nats
    kl  = KL(q || p) of a token, over the 256 tokens that q finds likeliest and all others taken as one

What is taken as one can only make the divergence smaller; on answers q is so peaked that it hardly does, and so little
is kept that it can lie beside the answers.

Axes: T tokens of an answer, V vocabulary, K tokens that are kept (256, or V - 1 where there are fewer).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from eqat_mm.errors import ConfigError

_KEPT = 256


@dataclass(frozen=True, eq=False)
class Predicted:
    """What is kept of a model's predictions at one answer.

    Attributes:
        answer: its token ids, int64 [T].
        nll: its negative log-likelihood, in nats.
        ids: the likeliest tokens, int64 [T, K].
        log_probs: their log-probabilities and behind them that of all other tokens, float32 [T, K + 1].
    """

    answer: Tensor
    nll: float
    ids: Tensor
    log_probs: Tensor


def predicted(logits_TV: Tensor, answer_T: Tensor) -> Predicted:
    """Return what is kept of predictions, on the CPU.

    Args:
        logits_TV: at the tokens of an answer.
        answer_T: the tokens.
    """
    log_probs_TV = logits_TV.float().log_softmax(-1)
    nll = -log_probs_TV.gather(-1, answer_T[:, None]).double().sum()
    ids_TK = log_probs_TV.topk(min(_KEPT, log_probs_TV.shape[-1] - 1)).indices
    return Predicted(answer_T.cpu(), float(nll), ids_TK.cpu(), _at(log_probs_TV, ids_TK).cpu())


def divergences(reference: Predicted, logits_TV: Tensor, answer_T: Tensor) -> Tensor:
    """Return KL(reference || model) at each token of an answer: float64 [T], in nats.

    Raises:
        ConfigError: the reference reads the answer as other tokens.
    """
    same = torch.equal(reference.answer, answer_T.cpu()) and int(reference.ids.max()) < logits_TV.shape[-1]
    if not same:
        raise ConfigError(
            "--reference",
            "a model that reads the answers as other tokens",
            "the model that was quantized, asked the same",
            "name that one",
        )
    own = _at(logits_TV.float().log_softmax(-1), reference.ids.to(logits_TV.device)).cpu().double()
    theirs = reference.log_probs.double()
    weights = theirs.exp()
    return (weights * (theirs - own)).masked_fill(weights == 0, 0.0).sum(-1)


def _at(log_probs_TV: Tensor, ids_TK: Tensor) -> Tensor:
    """Return the log-probabilities of some tokens, and behind them that of all others: [T, K + 1]."""
    others_TV = log_probs_TV.scatter(-1, ids_TK, -torch.inf)
    return torch.cat([log_probs_TV.gather(-1, ids_TK), others_TV.logsumexp(-1, keepdim=True)], -1)
