"""easy-VQA by image: pixels, what is on it, and what is asked about it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from eqat_demo.easy_vqa import Part, easy_vqa_folder, image_contents, parse_question, published_questions
from eqat_demo.llava.captions import captions

_BATCH = 64


@dataclass(frozen=True)
class Asked:
    """A question with its answer."""

    question: str
    answer: str

    @property
    def type(self) -> str:
        """Type of the question, as in `eqat_demo.easy_vqa`."""
        return parse_question(self.question).type

    @property
    def form(self) -> str:
        """What a guess goes by: its very words."""
        return self.question

    @property
    def weight(self) -> float:
        """How readily it is drawn in training.

        Four in five of the yes-no questions name something that is not there. They are drawn with a quarter of the
        weight: otherwise the blind guess is a good answer for so long that the image is not looked at.
        """
        return 0.25 if (self.type, self.answer) in {("yes_no", "no"), ("yes_no_negated", "yes")} else 1.0


@dataclass(frozen=True)
class Images:
    """A part of easy-VQA, in the order of the image numbers.

    Attributes:
        files: one PNG file per image.
        contents: colour and shape on each image, as far as its questions tell.
        asked: the questions about each image.
    """

    files: list[Path]
    contents: list[tuple[str | None, str | None]]
    asked: list[list[Asked]]

    @classmethod
    def of(cls, part: Part) -> Images:
        """Read a part, fetching the data on first use."""
        questions = published_questions(part)
        asked = defaultdict(list)
        for question, answer, number in questions:
            asked[number].append(Asked(question, answer))
        contents = image_contents(questions)
        folder = easy_vqa_folder() / "images" / part
        numbers = sorted(asked)
        return cls(
            [folder / f"{number}.png" for number in numbers],
            [contents[number] for number in numbers],
            [asked[number] for number in numbers],
        )

    def pixels(self, processor: Any) -> Tensor:
        """Return all images as the image processor hands them to a model: float32 (N, C, H, W)."""
        pixels: Tensor = processor(images=[read_rgb(file) for file in self.files], return_tensors="pt")["pixel_values"]
        return pixels

    def batches(self, processor: Any) -> Iterator[Tensor]:
        """Yield `pixels`, some at a time."""
        yield from self.pixels(processor).split(_BATCH)

    def images(self) -> Iterator[Image.Image]:
        """Yield the images."""
        return map(read_rgb, self.files)

    def captions(self, model: Any, tokenizer: Any, patches: int) -> tuple[list[int], Tensor]:
        """Return the images of which everything is known, and `language.captions` of them."""
        known = {at: (colour, shape) for at, (colour, shape) in enumerate(self.contents) if colour and shape}
        return list(known), captions(model, tokenizer, list(known.values()), patches)


def read_rgb(file: Path) -> Image.Image:
    """Read an image file."""
    with Image.open(file) as image:
        return image.convert("RGB")
