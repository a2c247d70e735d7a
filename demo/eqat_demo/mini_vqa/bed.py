"""mini-VQA as a bed that a LLaVA is trained for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

from PIL.Image import Image
from torch import Tensor

from eqat_demo.llava.bed import Bed
from eqat_demo.llava.language import Plan
from eqat_demo.mini_vqa.asked import Asked
from eqat_demo.mini_vqa.captions import captions
from eqat_demo.mini_vqa.pictures import PARTS, Part, Picture, pictures
from eqat_demo.mini_vqa.vision import CONFIG, pixels_of, train_vision_tower
from eqat_mm.runtime.progress import progress

_BATCH = 64
_CAPTIONED = 10
"""Of so many pictures the projector starts from one."""


class Drawn:
    """The pictures of a part, drawn when they are asked for."""

    def __init__(self, part: Part) -> None:
        drawn = progress(pictures(part), what=f"{part} pictures", total=PARTS[part].all)
        self.pictures: list[Picture] = [picture for picture in drawn if picture.asked]

    @cached_property
    def asked(self) -> Sequence[Sequence[Asked]]:
        """Questions about each picture."""
        return [picture.asked for picture in self.pictures]

    def batches(self, processor: Any) -> Iterator[Tensor]:
        """Yield the pictures as the image processor hands them to a model: float32 [B, 3, H, W]."""
        for start in progress(range(0, len(self.pictures), _BATCH), what="pixels", unit="batch"):
            yield pixels_of([picture.content for picture in self.pictures[start : start + _BATCH]], processor)

    def images(self) -> Iterator[Image]:
        """Yield the pictures."""
        return (picture.image() for picture in self.pictures)

    def captions(self, language: Any, tokenizer: Any, patches: int) -> tuple[list[int], Tensor]:
        """Return some pictures' indices, and embeddings of words for each of their squares: [N, P, D]."""
        chosen = list(range(0, len(self.pictures), _CAPTIONED))
        return chosen, captions(language, tokenizer, [self.pictures[each].content for each in chosen])


MINI = Bed(
    CONFIG,
    train_vision_tower,
    vision_steps=1200,
    part=Drawn,
    plan=Plan(steps=960, images=8, questions=13, rank=16),
    longest=24,
)
