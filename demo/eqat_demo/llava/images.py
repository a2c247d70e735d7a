"""easy-VQA by image: pixels, what is on it, and what is asked about it."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from eqat_demo.easy_vqa import Part, easy_vqa_folder, image_contents, parse_question, published_questions


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
    def names_the_absent(self) -> bool:
        """Whether it is a yes-no question about something that is not on the image."""
        return (self.type, self.answer) in {("yes_no", "no"), ("yes_no_negated", "yes")}


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


def read_rgb(file: Path) -> Image.Image:
    """Read an image file."""
    with Image.open(file) as image:
        return image.convert("RGB")
