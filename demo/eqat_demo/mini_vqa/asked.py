"""A question about a picture."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Asked:
    """A question with its answer.

    Attributes:
        type: its family: exist, count, compare, query, relate, nearest, list, word, word_held_out, bar_value
            or bar_rank.
        form: within the family, what decides which answers can be expected; they are balanced for each.
        question: as the model is asked.
        answer: in full.
    """

    type: str
    form: str
    question: str
    answer: str

    @property
    def weight(self) -> float:
        """How readily it is drawn in training: as any other, answers are balanced."""
        return 1.0
