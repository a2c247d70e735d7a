"""What stands for images in a text: as many tokens as the processor says, asked about blank images of their sizes.

Some processors write one run of tokens for an image, others rows with breaks, tiles with their places, or fewer tokens
for each where there are several. None of that is computed here. transformers' own arithmetic, where a processor has it,
is quicker than a blank image; it is used if it agrees with the processor on a few sizes.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple

from eqat_mm.data.image_text.columns import REPLACED
from eqat_mm.data.image_text.prompt import Renderer
from eqat_mm.errors import ConfigError

Size = tuple[int, int]
"""Height and width of an image in pixels."""

_TRIED: tuple[Size, ...] = ((40, 90), (336, 672), (30, 30), (1200, 500), (500, 1300))
_MOST_KNOWN = 2**16


class Written(NamedTuple):
    """What stands for an image in a text.

    Attributes:
        text: with one token in place of each run of the same one.
        more: tokens that the runs have besides.
    """

    text: str
    more: int


class ImageTokens:
    """What a processor writes for images.

    Args:
        processor: of a vision-language model.
        renderer: of the same.
    """

    def __init__(self, processor: Any, renderer: Renderer) -> None:
        self._processor, self._renderer = processor, renderer
        self._known: dict[tuple[Size, ...], list[Written]] = {}
        self._arithmetic: dict[bool, Written | None] = {}

    def of(self, sizes: Sequence[Size]) -> list[Written]:
        """Return what stands for each image of one conversation.

        Raises:
            ConfigError: the processor does not say.
        """
        key = tuple(sizes)
        if key not in self._known:
            if len(self._known) > _MOST_KNOWN:
                self._known.clear()
            self._known[key] = self._computed(key) or self._asked(key)
        return self._known[key]

    def _computed(self, sizes: tuple[Size, ...]) -> list[Written] | None:
        """Return the same by arithmetic, where it can be relied on; that of one image may be, of several not."""
        several = len(sizes) > 1
        if several not in self._arithmetic:
            tried: list[tuple[Size, ...]] = [(one, two) if several else (one,) for one, two in pairwise(_TRIED)]
            self._arithmetic[several] = self._agreed(tried)
        each = self._arithmetic[several]
        counts = None if each is None else self._counted(sizes)
        return None if each is None or counts is None else [Written(each.text, each.more + count) for count in counts]

    def _agreed(self, tried: list[tuple[Size, ...]]) -> Written | None:
        """Return the text of any image, and what must be added to the arithmetic; None where the processor differs."""
        found: set[Written] = set()
        for sizes in tried:
            counts = self._counted(sizes)
            if counts is None:
                return None
            found |= {
                Written(each.text, each.more - count) for each, count in zip(self._asked(sizes), counts, strict=True)
            }
        return found.pop() if len(found) == 1 else None

    def _counted(self, sizes: Sequence[Size]) -> list[int] | None:
        count = getattr(self._processor, "_get_num_multimodal_tokens", None)
        return None if count is None else list(count(image_sizes=list(sizes))["num_image_tokens"])

    def _asked(self, sizes: Sequence[Size]) -> list[Written]:
        from PIL import Image

        images = [Image.new("RGB", (width, height)) for height, width in sizes]
        text = self._renderer.image_token * len(images)
        inputs = self._renderer.inputs(text, images, return_text_replacement_offsets=True)
        return [self._shortened(place["replacement"]) for place in places_of(inputs, self._processor)]

    def _shortened(self, text: str) -> Written:
        runs = [len(run[0]) // len(run[1]) - 1 for run in self._runs.finditer(text)]
        return Written(self._runs.sub(r"\1", text), sum(runs))

    @cached_property
    def _runs(self) -> re.Pattern[str]:
        added = sorted(self._renderer.tokenizer.get_added_vocab(), key=len, reverse=True)
        return re.compile(rf"({'|'.join(map(re.escape, added))})\1+" if added else "(?!)")


def places_of(inputs: dict[str, Any], processor: Any) -> list[dict[str, Any]]:
    """Return where a processor has put images into the text, and what it wrote.

    Raises:
        ConfigError: it does not say.
    """
    if REPLACED in inputs:
        found: list[dict[str, Any]] = inputs[REPLACED]
        return found
    raise ConfigError(
        f"processor {type(processor).__name__}",
        f"no {REPLACED}: it does not say what it writes in place of images",
        "a processor whose image tokens can be told from the words around them",
        "train this model on text; what a conversation's answers are cannot be found in its tokens",
    )
