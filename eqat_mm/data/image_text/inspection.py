"""The check of image-text samples before training: which can be used, how long they are, what is wrong with others."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

from eqat_mm.data.image_text.conversations import Conversation, Records
from eqat_mm.data.image_text.images import ImageSource, Size
from eqat_mm.data.image_text.problems import BadSample, TooLong, refusals
from eqat_mm.data.image_text.quick_lengths import ExactLengths

_CHARACTERS = 256
"""Of a token at most: the longest tokens of published vocabularies are runs of 128 spaces."""

_MOST_IMAGES = 2**15
"""Whose sizes a process remembers: published data ask many questions about one image."""


class Image(NamedTuple):
    """An image of a record: a hash of its name, and its size."""

    number: int
    size: Size


class Finding(NamedTuple):
    """What is known of a record.

    Attributes:
        content: hash of what is said and of the names of images; 0 where the record is not in the format.
        length: tokens; 0 where they were not counted.
        images: that are shown.
        mended: in what it departs from the format.
        cuts: it has more than the tokens allowed, and its images and the beginning of an answer are among the first.
        problem: what is wrong with it, cut or not; None where nothing is.
    """

    content: int = 0
    length: int = 0
    images: tuple[Image, ...] = ()
    mended: tuple[str, ...] = ()
    cuts: bool = False
    problem: BadSample | None = None


def require_short(length: int, max_length: int) -> None:
    """Raise `TooLong` for more than `max_length` tokens."""
    if length > max_length:
        raise TooLong(f"{length:,} tokens, more than max_length ({max_length:,})")


def hash_of(*parts: object) -> int:
    """Return a hash of 63 bits, the same in every process."""
    text = "\0".join(map(str, parts)).encode(errors="surrogatepass")
    digest = hashlib.blake2b(text, digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class Inspector:
    """Checks records, the length of each last: tokenizers are faster with many texts.

    Args:
        lengths: of texts, by the model's processor.
        records: of a source.
        max_length: most tokens of a sample.
        look: returns the size of an image, or raises `BadSample`.
    """

    def __init__(
        self, lengths: ExactLengths, records: Records, max_length: int, look: Callable[[ImageSource], Size]
    ) -> None:
        self.records = records
        self._lengths = lengths
        self._chat = lengths.chat
        self._max_length = max_length
        self._size_of = lru_cache(maxsize=_MOST_IMAGES)(look)
        self._seen: set[int] = set()
        self._folder = f"{records.image_folder}/"

    def inspect_all(self, indices: Iterable[int]) -> list[Finding]:
        """Return what is known of some records."""
        found: dict[int, Finding] = {}
        fitting: list[tuple[int, Conversation, str]] = []
        for index in indices:
            finding, conversation, text = self._inspect(index)
            found[index] = finding
            if text is not None and conversation is not None:
                fitting.append((index, conversation, text))
        sizes = [[image.size for image in found[index].images] for index, _, _ in fitting]
        counted = self._counted([text for _, _, text in fitting], sizes)
        for (index, conversation, _), length in zip(fitting, counted, strict=True):
            found[index] = self._measured(found[index], conversation, length)
        return list(found.values())

    def _inspect(self, index: int) -> tuple[Finding, Conversation | None, str | None]:
        finding, conversation = Finding(), None
        try:
            conversation = self.records.conversation(index)
            names = [str(image).removeprefix(self._folder) for image in conversation.images]
            spoken = [part for turn in conversation.turns for part in turn]
            finding = Finding(hash_of(*spoken, "", *names), mended=conversation.mended)
            _require_bounded(conversation, self._max_length)
            images = [
                Image(hash_of(name), self._size_of(image))
                for name, image in zip(names, conversation.images, strict=True)
            ]
            finding = finding._replace(images=tuple(images))
            return finding, conversation, self._text(conversation)
        except BadSample as error:
            return finding._replace(problem=error), conversation, None

    def _text(self, conversation: Conversation) -> str:
        turns = len(conversation.turns)
        with refusals():
            text = self._lengths.text(conversation)
            if turns not in self._seen:  # a matter of the template, hardly of the words
                self._chat.answers(conversation, text)
                self._seen.add(turns)
        return text

    def _counted(self, texts: Sequence[str], sizes: Sequence[Sequence[Size]]) -> list[int | BadSample]:
        """Return the tokens of each sample, or why they cannot be counted."""
        try:
            with refusals():
                return [*self._lengths.lengths(texts, sizes)]
        except BadSample as error:
            if len(texts) == 1:
                return [error]
            return [self._counted([text], [each])[0] for text, each in zip(texts, sizes, strict=True)]

    def _measured(self, finding: Finding, conversation: Conversation, length: int | BadSample) -> Finding:
        try:
            if isinstance(length, BadSample):
                raise length
            if length > 0.9 * self._max_length:
                length = self._length_of(self._chat.text(conversation), finding.images)
            finding = finding._replace(length=length)
            require_short(length, self._max_length)
            return finding
        except TooLong as error:
            problem: BadSample = error
        except BadSample as error:
            return finding._replace(problem=error)
        try:
            self._require_cut(conversation, finding.images, problem)
        except BadSample as error:
            return finding._replace(problem=error)
        return finding._replace(problem=problem, cuts=True)

    def _require_cut(self, conversation: Conversation, images: Sequence[Image], problem: BadSample) -> None:
        """Check that all images, and a token of the first answer, are among the first `max_length` tokens.

        Raises:
            BadSample: they are not, or the template puts the answer elsewhere.
        """
        token = self._chat.processor.image_token
        first = next(place for place, turn in enumerate(conversation.turns) if turn.role == "assistant")
        with refusals():
            text = self._chat.text(conversation)
            start = self._chat.answers(replace(conversation, turns=conversation.turns[: first + 1]), text)[0][0]
        asked = self._length_of(text[:start], images)
        shown = self._length_of(text[: text.rfind(token) + len(token)], images) if images else 0
        if asked + 1 >= self._max_length or shown > self._max_length:
            raise TooLong(f"{problem}; cut, no answer is left, or no whole image")

    def _length_of(self, text: str, images: Sequence[Image]) -> int:
        with refusals():
            return self._chat.lengths([text], [[image.size for image in images]])[0]


def _require_bounded(conversation: Conversation, max_length: int) -> None:
    """Refuse what can be seen to be too long before the template and the tokenizer work on it for minutes."""
    characters = sum(len(turn.text) for turn in conversation.turns)
    for count, most, what in (
        (characters, max_length * _CHARACTERS, "characters"),
        (len(conversation.turns), max_length, "turns"),
        (len(conversation.images), max_length, "images"),
    ):
        if count > most:
            raise TooLong(f"{count:,} {what}, more than max_length ({max_length:,} tokens) can hold")
