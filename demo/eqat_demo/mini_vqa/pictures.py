"""Pictures with their questions, drawn one after the other from a seed: the training part, and the test part."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from random import Random
from typing import Any, Literal

from PIL.Image import Image

from eqat_demo.mini_vqa import bars, scene_questions
from eqat_demo.mini_vqa.asked import Asked
from eqat_demo.mini_vqa.balance import Balance
from eqat_demo.mini_vqa.bars import Chart, random_chart
from eqat_demo.mini_vqa.drawing import drawn
from eqat_demo.mini_vqa.scenes import Scene, random_scene
from eqat_demo.mini_vqa.words import Written, random_word, word_questions
from eqat_mm.runtime.seeding import derive_seed

Part = Literal["train", "test"]
Content = Scene | Chart | Written


@dataclass(frozen=True)
class Counts:
    """How many pictures there are of each kind."""

    scenes: int
    charts: int
    words: int

    @property
    def all(self) -> int:
        """Pictures of all kinds."""
        return self.scenes + self.charts + self.words


PARTS: dict[Part, Counts] = {"train": Counts(8000, 2500, 5500), "test": Counts(260, 80, 150)}


@dataclass(frozen=True)
class Picture:
    """A picture.

    Attributes:
        content: what is on it.
        asked: questions about it.
    """

    content: Content
    asked: list[Asked]

    def image(self) -> Image:
        """Return it as pixels."""
        return drawn(self.content)


def pictures(part: Part, counts: Counts | None = None) -> Iterator[Picture]:
    """Yield the pictures of a part: scenes, then charts, then words.

    Half of the words of the test part are held out of training.

    Args:
        part: of the data; the parts share nothing but the words that are not held out.
        counts: of pictures; those of the whole part by default.
    """
    counts = counts or PARTS[part]
    balance = Balance()
    for number in range(counts.scenes):
        random = _random(part, "scene", number)
        scene = random_scene(random)
        yield Picture(scene, _about(scene, scene_questions.FAMILIES, balance, random))
    for number in range(counts.charts):
        random = _random(part, "chart", number)
        chart = random_chart(random)
        yield Picture(chart, _about(chart, bars.FAMILIES, balance, random))
    for number in range(counts.words):
        written = random_word(_random(part, "word", number), held_out=part == "test" and number % 2 == 1)
        yield Picture(written, word_questions(written))


def _about(content: Any, families: Mapping[Any, int], balance: Balance, random: Random) -> list[Asked]:
    chosen = (balance.choose(ask(content, random), count, random) for ask, count in families.items())
    return [each for questions in chosen for each in questions]


def _random(part: Part, kind: str, number: int) -> Random:
    return Random(derive_seed(0, "mini-VQA", part, kind, number))
