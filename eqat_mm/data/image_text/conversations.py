r"""The instruction format of LLaVA: conversations about images, read and checked without opening an image.

A record is `{"id": ..., "image": "a.jpg", "conversations": [{"from": "human", "value": "<image>\nWhat is it?"},
{"from": "gpt", "value": "A cat."}, ...]}`. `image` is a path, a list of paths, or missing for text alone; every
`<image>` in a human turn stands for the next image. `user` and `assistant` are understood as names, too, and a first
turn `system`. Other fields are ignored.

What a source may be: `eqat_mm.data.image_text.record_sources`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any, Literal, NamedTuple

from eqat_mm.data.image_text.images import ImageSource, file_below
from eqat_mm.data.image_text.problems import BadSample
from eqat_mm.data.image_text.record_files import Places
from eqat_mm.data.user_files import printable, shown, told

IMAGE = "<image>"
"""What stands for an image in a human turn, whatever the model's own image token is."""

Role = Literal["system", "user", "assistant"]
Mended = str
FIRST_BY_MODEL = "first turn by the model, left out"
IMAGE_REPEATED = "several <image> in a turn for one image, read as one"
IMAGE_IS_TEXT = "<image> without an image, read as text"
IMAGE_NOT_SHOWN = "image without <image>, not shown"
MENDED = (FIRST_BY_MODEL, IMAGE_REPEATED, IMAGE_IS_TEXT, IMAGE_NOT_SHOWN)
"""In what records of the published data depart from the format, and how LLaVA reads them nevertheless."""

_ROLES: dict[str, Role] = {
    "human": "user",
    "gpt": "assistant",
    "system": "system",
    "user": "user",
    "assistant": "assistant",
}


class Turn(NamedTuple):
    """One turn: who speaks, and the text as it is written, white space at its ends included."""

    role: Role
    text: str


@dataclass(frozen=True)
class Conversation:
    """A record that keeps to the format.

    Attributes:
        where: file and record, for messages.
        turns: maybe one of the system, then user and assistant in turn, an assistant's last.
        images: one for every `<image>` in the turns, in this order; where there are none, `<image>` is text.
        mended: in what it departs from the format, as the published data do, and was read as LLaVA reads it.
    """

    where: str
    turns: tuple[Turn, ...]
    images: tuple[ImageSource, ...]
    mended: tuple[Mended, ...] = ()


@dataclass(frozen=True)
class Records:
    """The records of one source, as stored.

    Attributes:
        source: file or data set.
        rows: dictionaries, if the source keeps to the format.
        counted: what a record is called in messages: `record`, `line` or `row`.
        places: where each record is in its file; of a data set only the numbers of rows count.
        image_folder: paths of images are relative to it.
    """

    source: str
    rows: Sequence[Any]
    counted: str
    places: Places
    image_folder: Path

    def __len__(self) -> int:
        return len(self.rows)

    def where(self, index: int) -> str:
        """Return the name of a record in messages."""
        return printable(f"{self.source}, {self.counted} {self.places.numbers[index]}")

    def conversation(self, index: int) -> Conversation:
        """Return one record, checked for everything but the images' contents.

        Raises:
            BadSample: it does not keep to the format, or names an image outside the image folder.
        """
        try:
            record = self.rows[index]
        except (ValueError, ArithmeticError, LookupError) as error:  # a table's row that is not what its schema says
            raise BadSample(told(error)) from error
        if not isinstance(record, dict):
            raise BadSample(f"a JSON {type(record).__name__} instead of an object")
        turns, mended = _turns(record.get("conversations"))
        images = self._images(record.get("image"), index)
        turns, images, more = _placed(turns, images)
        return Conversation(self.where(index), turns, images, mended + more)

    def _images(self, value: Any, index: int) -> tuple[ImageSource, ...]:
        values = value if isinstance(value, list) else [] if value in (None, "") else [value]
        return tuple(self._image(value, index, position) for position, value in enumerate(values))

    def _image(self, value: Any, index: int, position: int) -> ImageSource:
        if isinstance(value, str) and value:
            return file_below(self.image_folder, value)
        if isinstance(value, dict) and hasattr(self.rows, "image"):  # rows of a table hold images, too
            stored: ImageSource = self.rows.image(value, index, position)
            return stored
        raise BadSample(f"image is {shown(value)}, not a path")


def _turns(value: Any) -> tuple[tuple[Turn, ...], tuple[Mended, ...]]:
    """Return the turns of a record, checked for speakers, order and answers, and whether one was left out."""
    if not isinstance(value, list) or not value:
        raise BadSample("no list of turns in `conversations`")
    opening = 1 if _role(value[0]) == "system" else 0
    left_out = len(value) > opening and _role(value[opening]) == "assistant"
    numbered = [(number, item) for number, item in enumerate(value, start=1) if not left_out or number != opening + 1]
    turns = tuple(_turn(item, number) for number, item in numbered)
    for (number, _), turn, expected in zip(numbered[opening:], turns[opening:], cycle(("user", "assistant"))):
        if turn.role != expected:
            raise BadSample(f"turn {number} is the {turn.role}'s, where the {expected} should speak")
    if not turns[opening:] or turns[-1].role != "assistant":
        raise BadSample("no answer to the last turn")
    return turns, (FIRST_BY_MODEL,) if left_out else ()


def _placed(
    turns: tuple[Turn, ...], images: tuple[ImageSource, ...]
) -> tuple[tuple[Turn, ...], tuple[ImageSource, ...], tuple[Mended, ...]]:
    """Return turns and images that fit each other: one `<image>` for each, or none at all."""
    named = sum(turn.text.count(IMAGE) for turn in turns)
    if not images:
        return turns, images, (IMAGE_IS_TEXT,) if named else ()
    if not named:
        return turns, (), (IMAGE_NOT_SHOWN,)
    for number, turn in enumerate(turns, start=1):
        if turn.role != "user" and IMAGE in turn.text:
            raise BadSample(f"{IMAGE} in turn {number}, which is the {turn.role}'s")
    if named > len(images):
        turns = tuple(Turn(turn.role, _once(turn.text)) for turn in turns)
    if sum(turn.text.count(IMAGE) for turn in turns) != len(images):
        raise BadSample(f"{named} {IMAGE} in the text for {len(images)} images")
    return turns, images, (IMAGE_REPEATED,) if named > len(images) else ()


def _once(text: str) -> str:
    """Return a text with the first of its `<image>` alone."""
    before, image, behind = text.partition(IMAGE)
    return before + image + behind.replace(IMAGE, "")


def _role(item: Any) -> Role | None:
    name = item.get("from") if isinstance(item, dict) else None
    return _ROLES.get(name) if isinstance(name, str) else None


def _turn(item: Any, number: int) -> Turn:
    try:  # nearly all are as they should be, and there are millions
        role, text = _ROLES[item["from"]], item["value"]
        text.encode()
        if text.strip():
            return Turn(role, text)
    except (LookupError, TypeError, AttributeError, UnicodeEncodeError):
        pass
    raise _fault(item, number)


def _fault(item: Any, number: int) -> BadSample:
    if not isinstance(item, dict) or not all(isinstance(item.get(key), str) for key in ("from", "value")):
        return BadSample(f"turn {number} has not the two strings `from` and `value`")
    role = _ROLES.get(item["from"])
    if role is None:
        return BadSample(f"unknown speaker {item['from']!r:.40} in turn {number} (known: {', '.join(_ROLES)})")
    if not item["value"].strip():
        return BadSample(f"empty {'answer' if role == 'assistant' else 'text'} in turn {number}")
    # JSON can spell half of a surrogate pair; no tokenizer takes it
    return BadSample(f"turn {number} holds text that is not Unicode")
