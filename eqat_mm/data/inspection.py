"""The check of image-text samples before training: which can be used, how long they are, what is wrong with others."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

from eqat_mm.data.chat import Chat
from eqat_mm.data.conversations import Conversation, Records
from eqat_mm.data.images import ImageSource, Size
from eqat_mm.data.problems import BadSample, MissingImage, Problem, TooLong, refusals
from eqat_mm.data.user_files import printable
from eqat_mm.errors import DataError
from eqat_mm.runtime.progress import progress

_PER_BATCH = 256
_HOPELESS = 1000
"""Images missing, and none there."""

_CHARACTERS = 256
"""Of a token at most: the longest tokens of published vocabularies are runs of 128 spaces."""


def check_samples(inspector: Inspector, chosen: list[int]) -> tuple[list[Conversation], list[int], list[Problem]]:
    """Return the good ones of the records with these indices, their lengths in tokens, and what is wrong with the bad.

    Raises:
        DataError: the first thousand images are all missing.
    """
    conversations: list[Conversation] = []
    lengths: list[int] = []
    problems: dict[int, Problem] = {}
    for start in progress(range(0, len(chosen), _PER_BATCH), what="check samples", unit="batch"):
        good, bad = inspector.inspect_all(chosen[start : start + _PER_BATCH])
        conversations += [conversation for conversation, _ in good]
        lengths += [length for _, length in good]
        problems |= bad
        _stop_without_images(inspector.records, conversations, problems)
    return conversations, lengths, [problems[index] for index in sorted(problems)]


def _stop_without_images(records: Records, conversations: list[Conversation], problems: dict[int, Problem]) -> None:
    """Raise `DataError` where the first thousand images are all missing: so are the others then."""
    if len(problems) < _HOPELESS or any(conversation.images for conversation in conversations):
        return
    missing = [problem for problem in problems.values() if problem.kind is MissingImage]
    if len(missing) >= _HOPELESS:
        raise DataError(
            printable(records.source),
            f"the first {len(missing):,} images are all missing, beginning with {missing[0]}",
            f"images below {printable(records.image_folder)}",
            MissingImage.do,
        )


def _short(length: int | BadSample, max_length: int) -> int:
    if isinstance(length, BadSample):
        raise length
    require_short(length, max_length)
    return length


def require_short(length: int, max_length: int) -> None:
    """Raise `TooLong` for more than `max_length` tokens."""
    if length > max_length:
        raise TooLong(f"{length:,} tokens, more than max_length ({max_length:,})")


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


class _Inspected(NamedTuple):
    conversation: Conversation
    text: str
    sizes: list[Size]


class Inspector:
    """Checks records, the length of each last: tokenizers are faster with many texts.

    Args:
        chat: the model's processor.
        records: of a source.
        max_length: most tokens of a sample.
        look: returns the size of an image, or raises `BadSample`.
    """

    def __init__(self, chat: Chat, records: Records, max_length: int, look: Callable[[ImageSource], Size]) -> None:
        self.records = records
        self._chat = chat
        self._max_length = max_length
        self._size_of = lru_cache(maxsize=None)(look)  # published sets ask many questions about one image
        self._seen: set[int] = set()

    def inspect_all(self, indices: list[int]) -> tuple[list[tuple[Conversation, int]], dict[int, Problem]]:
        """Return the good ones of some records with their lengths in tokens, and by index what is wrong with others."""
        fitting: list[tuple[int, _Inspected]] = []
        good: list[tuple[Conversation, int]] = []
        bad: dict[int, Problem] = {}
        for index in indices:
            try:
                fitting.append((index, self._inspect(index)))
            except BadSample as error:
                bad[index] = Problem.of(self.records.where(index), error)
        for (index, sample), length in zip(fitting, self._lengths([each for _, each in fitting]), strict=True):
            try:
                good.append((sample.conversation, _short(length, self._max_length)))
            except BadSample as error:
                bad[index] = Problem.of(self.records.where(index), error)
        return good, bad

    def _lengths(self, samples: list[_Inspected]) -> list[int | BadSample]:
        """Return the tokens of each sample, or why they cannot be counted."""
        try:
            with refusals():
                return [*self._chat.lengths([each.text for each in samples], [each.sizes for each in samples])]
        except BadSample as error:
            return [error] if len(samples) == 1 else [self._lengths([each])[0] for each in samples]

    def _inspect(self, index: int) -> _Inspected:
        conversation = self.records.conversation(index)
        _require_bounded(conversation, self._max_length)
        sizes = [self._size_of(image) for image in conversation.images]
        turns = len(conversation.turns)
        with refusals():
            text = self._chat.text(conversation)
            if turns not in self._seen:  # a matter of the template, hardly of the words
                self._chat.answers(conversation, text)
                self._seen.add(turns)
        return _Inspected(conversation, text, sizes)
