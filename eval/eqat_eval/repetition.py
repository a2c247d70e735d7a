"""A number for the commonest way a 2-bit model fails while its perplexity looks fine: saying it again.

For a sequence of m tokens with its m - n + 1 overlapping n-grams:

    repeated_4grams = 1 - distinct 4-grams / all 4-grams     seq-rep-4, Welleck et al. 2019 (1908.04319)
    distinct_2      = distinct 2-grams / all 2-grams         after Li et al. 2016 (1510.03055), who
                                                             divide by the number of tokens instead

Both depend on length (a longer text repeats more) and on the decoding (greedy repeats more, also in
full precision), so compare only texts made with the same settings, and with the reference model's.
A low score is not quality: random words do not repeat either. Read the samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Repetition:
    """Repetition of one sequence or the mean over several.

    Attributes:
        repeated_4grams: 0 (no 4-gram occurs twice) to nearly 1 (a loop); None under 4 tokens.
        distinct_2: 1 (no 2-gram occurs twice) to nearly 0; None under 2 tokens.
    """

    repeated_4grams: float | None
    distinct_2: float | None


def repetition(token_ids: Sequence[int]) -> Repetition:
    """Measure the repetition of one sequence of token ids (generated tokens only, without the prompt).

    A sequence too short to have an n-gram gets None, not 0: a model that stops at once is not good.
    """
    distinct_4, distinct_2 = _distinct_share(token_ids, 4), _distinct_share(token_ids, 2)
    return Repetition(None if distinct_4 is None else 1.0 - distinct_4, distinct_2)


def _distinct_share(token_ids: Sequence[int], n: int) -> float | None:
    grams = [tuple(token_ids[start : start + n]) for start in range(len(token_ids) - n + 1)]
    return len(set(grams)) / len(grams) if grams else None
