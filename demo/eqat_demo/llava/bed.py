"""A bed of questions, as far as training a LLaVA for it goes; and easy-VQA as one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from PIL.Image import Image
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModel

from eqat_demo.easy_vqa import Part
from eqat_demo.llava import language, vision
from eqat_demo.llava.images import Images
from eqat_mm.runtime.progress import say


class Shown(Protocol):
    """The images of a part, with what is asked about them."""

    @property
    def asked(self) -> Sequence[Sequence[Any]]:
        """Questions about each image, in the form of `Asked`."""

    def batches(self, processor: Any) -> Iterator[Tensor]:
        """Yield the images as the image processor hands them to a model: float32 [B, 3, H, W]."""

    def images(self) -> Iterator[Image]:
        """Yield the images."""

    def captions(self, language: Any, tokenizer: Any, patches: int) -> tuple[list[int], Tensor]:
        """Return some images' indices, and embeddings of words for each of their patches: [N, P, D]."""


@dataclass(frozen=True)
class Bed:
    """A bed of questions.

    Attributes:
        config: of the vision tower.
        tower: trains it, given the image processor, a number of steps and a file to go on from.
        vision_steps: that number.
        part: returns the training or the test part.
        plan: how the language model learns to read what the tower sees.
        longest: tokens of an answer.
    """

    config: CLIPVisionConfig
    tower: Callable[[Any, int, Path], CLIPVisionModel]
    vision_steps: int
    part: Callable[[Part], Shown]
    plan: language.Plan
    longest: int


def _tower(processor: Any, steps: int, kept: Path) -> CLIPVisionModel:
    parts = [Images.of("train"), Images.of("test")]
    pixels = [part.pixels(processor) for part in parts]
    labels = [vision.labels_of(part.contents) for part in parts]
    tower, classifiers = vision.train_vision_tower(pixels[0], labels[0], steps, kept)
    for name, seen, right in zip(("training", "test"), pixels, labels, strict=True):
        colour, shape = classifiers.accuracy(vision.all_features(tower, seen.split(vision.BATCH)), right)
        say(f"{name} images: colour {colour:.2%}, shape {shape:.2%}")
    return tower


EASY = Bed(vision.CONFIG, _tower, vision.STEPS, Images.of, language.Plan(), longest=4)
