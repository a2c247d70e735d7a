"""Which conversations, how they are checked, and in which order they come: settings only."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from eqat_mm.data.image_text.problems import OnBadSample, TooLongSample
from eqat_mm.data.image_text.style import AUTO, ImageShape, Style, require_template
from eqat_mm.runtime.settings import Count, CountOrZero, Fraction, Seed, Settings


@dataclass(frozen=True)
class Conversations(Settings, option="conversations"):
    """Conversations about images: which ones, and how they are checked.

    Attributes:
        source: conversations in LLaVA's format: a .json or .jsonl file, `hf:NAME[:CONFIG[:SPLIT]]`, or a name of
            `eqat assets`.
        image_folder: what the records' image paths are relative to. Default: the folder of the source file.
        template: of the conversation: `auto` (the one that the model was trained with), `vicuna_v1`, `model` (the one
            in its folder), or the path of a .jinja file. The checkpoint keeps it.
        images: what becomes of images that are no squares: `pad`, `crop`, `model` (what its folder says), or `auto`
            (what the model was trained with). The checkpoint keeps it.
        max_length: most tokens of a sample; those of its images count.
        too_long: what becomes of longer ones: `truncate` cuts them, as LLaVA does; one of which no answer, or only a
            part of an image, would be left is a bad sample. `skip` leaves them out, `error` stops before training.
        check: how images are checked before training: `header`, or `decode`, which takes as long as reading them all.
        on_bad_sample: what a bad sample does: `error` stops before training, `skip` leaves such samples out and says
            how many.
        max_skipped: largest share of the samples that `skip` may leave out; up to ten may always be.
        seed: which records are drawn, and their order.
    """

    source: str
    image_folder: Path | None = None
    template: str = AUTO
    images: ImageShape = AUTO
    max_length: Count = 2048
    too_long: TooLongSample = "truncate"
    check: Literal["header", "decode"] = "header"
    on_bad_sample: OnBadSample = "error"
    max_skipped: Fraction = 0.1
    seed: Seed = 0

    def check_together(self) -> None:
        """Check that the template is there, before anything is read."""
        require_template(self.template, f"--{self.option}template")

    @property
    def style(self) -> Style:
        """How the model is addressed."""
        return Style(self.template, self.images)

    def drawn(self, count: int) -> ImageTextData:
        """Return these conversations, so many of them."""
        return ImageTextData(**{item.name: getattr(self, item.name) for item in fields(Conversations)}, count=count)


@dataclass(frozen=True)
class ImageTextData(Conversations, option="conversations"):
    """Conversations to train on: how many of them, in which order, and which of them judge the model.

    Attributes:
        count: number of records, drawn at random; None takes all.
        text_warmup_steps: optimizer steps at the beginning over which the share of samples without images falls from
            all to none; after that, samples come as they are drawn. 0: no warm-up.
        held_out: number of samples to judge the model by; drawn at random, and not trained on.
        held_out_source: other conversations to judge it by instead, in the same format, with the same image folder.
    """

    count: Count | None = None
    text_warmup_steps: CountOrZero = 0
    held_out: CountOrZero = 0
    held_out_source: str | None = None
