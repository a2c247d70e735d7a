"""Predictions at an answer: negative log-likelihood and divergence against direct computations."""

from __future__ import annotations

import pytest
import torch

from eqat_eval.predictions import divergences, predicted
from eqat_mm.errors import ConfigError
from tests.checkpoint.files import assert_four_lines

ANSWER = torch.tensor([3, 0, 7])


def logits(vocabulary: int, scale: float = 3.0) -> torch.Tensor:
    return scale * torch.randn(len(ANSWER), vocabulary)


def exact(reference: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    q, p = (each.double().log_softmax(-1) for each in (reference, own))
    return (q.exp() * (q - p)).sum(-1)


def test_the_likelihood_is_that_of_the_answer() -> None:
    own = logits(40)
    found = predicted(own, ANSWER)
    assert found.nll == pytest.approx(float(torch.nn.functional.cross_entropy(own, ANSWER, reduction="sum")), rel=1e-5)


def test_the_divergence_of_a_small_vocabulary_is_exact() -> None:
    reference, own = logits(40), logits(40)
    found = divergences(predicted(reference, ANSWER), own, ANSWER)
    torch.testing.assert_close(found, exact(reference, own), rtol=1e-4, atol=1e-5)


def test_what_is_taken_as_one_makes_it_a_little_smaller() -> None:
    reference = logits(2000)
    own = reference + 0.3 * logits(2000)
    found = divergences(predicted(reference, ANSWER), own, ANSWER)
    whole = exact(reference, own)
    assert (found <= whole + 1e-6).all()
    assert (found > 0.8 * whole).all()


def test_a_model_does_not_diverge_from_itself_and_masked_words_do_no_harm() -> None:
    own = logits(600)
    own[:, 100:] = -torch.inf
    found = divergences(predicted(own, ANSWER), own, ANSWER)
    assert torch.equal(found, torch.zeros(3, dtype=torch.float64))


@pytest.mark.parametrize(("vocabulary", "answer"), [(40, torch.tensor([3, 0, 8])), (40, ANSWER[:2]), (20, ANSWER)])
def test_another_tokenizer_s_reference_is_refused(vocabulary: int, answer: torch.Tensor) -> None:
    reference = logits(40)
    reference[:, 30] = 50.0
    with pytest.raises(ConfigError, match="other tokens") as raised:
        divergences(predicted(reference, ANSWER), logits(vocabulary)[: len(answer)], answer)
    assert_four_lines(raised.value)
