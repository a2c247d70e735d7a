"""Balanced answers, as CLEVR has them: of what can be asked about a picture, what was answered least often so far."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from random import Random

from eqat_demo.mini_vqa.asked import Asked

_LEAD = 1.15
_FIRST = 3


class Balance:
    """Chooses questions, and remembers how often each form had each answer."""

    def __init__(self) -> None:
        self._chosen: Counter[tuple[str, str]] = Counter()
        self._answers: dict[str, set[str]] = {}

    def choose(self, possible: Iterable[Asked], count: int, random: Random) -> list[Asked]:
        """Return up to `count` of the questions, no two alike: fewer where all else would tip the balance."""
        left = list(dict.fromkeys(possible))
        random.shuffle(left)
        for each in left:
            self._answers.setdefault(each.form, set()).add(each.answer)
        chosen: list[Asked] = []
        while left and len(chosen) < count:
            rarest = min(left, key=lambda each: self._chosen[each.form, each.answer])
            if self._is_common(rarest):
                break
            self._chosen[rarest.form, rarest.answer] += 1
            chosen.append(rarest)
            left = [each for each in left if each.question != rarest.question]
        return chosen

    def _is_common(self, asked: Asked) -> bool:
        answers = self._answers[asked.form]
        mean = sum(self._chosen[asked.form, answer] for answer in answers) / len(answers)
        return self._chosen[asked.form, asked.answer] > _LEAD * mean + _FIRST
