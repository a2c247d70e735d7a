"""Texts and lengths of very many conversations, at a fraction of what template and tokenizer take.

Most conversations differ in words alone. A template is therefore asked once for each outline (speakers, places of
images, white space around them), with marks in place of the words; and a word that was counted once is not tokenised
again, wherever the tokenizer gives it the same tokens between single spaces. Whether template and tokenizer are of that
kind, as nearly all are, is not known from their files but tried: on the first samples, and on some of each batch. Where
they are not once, `Inexact` is raised, and whoever counts asks the two themselves for every sample.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache

from eqat_mm.data.image_text.chat import Chat, is_written
from eqat_mm.data.image_text.conversations import IMAGE, Conversation, Turn
from eqat_mm.data.image_text.image_tokens import Size
from eqat_mm.data.image_text.problems import BadSample, Inexact

_TRIED = 4
"""Of each batch."""

_SIZE: Size = (90, 40)
"""Of any image, where it does not matter."""

_MARK = "qvjz{}zjvq"
_MOST_OUTLINES = 2**12
_MOST_WORDS = 2**18
"""Remembered by a process: some 40 MB."""

_BETWEEN_WORDS = re.compile(r"(?<=\S) (?=\S)")

_Shape = tuple[tuple[str, tuple[tuple[str, bool, str], ...]], ...]


class ExactLengths:
    """Asks template and tokenizer for every sample.

    Args:
        chat: the model's processor.
    """

    def __init__(self, chat: Chat) -> None:
        self.chat = chat

    def text(self, conversation: Conversation) -> str:
        """As `Chat.text`."""
        return self.chat.text(conversation)

    def lengths(self, texts: Sequence[str], sizes: Sequence[Sequence[Size]]) -> list[int]:
        """As `Chat.lengths`."""
        return self.chat.lengths(texts, sizes)


class QuickLengths(ExactLengths):
    """The quick way.

    Args:
        chat: the model's processor.
        samples: conversations that template and tokenizer take, to learn from.

    Raises:
        Inexact: it does not work with this template or tokenizer.
    """

    def __init__(self, chat: Chat, samples: Sequence[Conversation]) -> None:
        super().__init__(chat)
        self._outline = lru_cache(maxsize=_MOST_OUTLINES)(self._asked)
        self._words: dict[str, int] = {}
        added = sorted(chat.tokenizer.get_added_vocab(), key=len, reverse=True)
        self._added = re.compile(f"({'|'.join(map(re.escape, added))})" if added else "(?!)")
        texts = [self.text(sample) for sample in samples]
        if texts != [chat.text(sample) for sample in samples]:
            raise Inexact("the template")
        plain = [at for at, sample in enumerate(samples) if not is_written(sample)]
        self._lead, self._more = self._fitting([texts[at] for at in plain], [len(samples[at].images) for at in plain])

    def text(self, conversation: Conversation) -> str:
        """Return a conversation as its model's text.

        Raises:
            BadSample: the template refuses conversations of this outline, or loses their images.
        """
        shape, words = _taken_apart(conversation)
        found = self._outline(shape, len(conversation.images))
        if found is None:
            return self.chat.text(conversation)
        if isinstance(found, str):
            raise BadSample(found)
        parts = [""] * (2 * len(words) + 1)
        parts[::2], parts[1::2] = found, words
        text = "".join(parts)
        images = text.count(self.chat.processor.image_token)
        return text if images == len(conversation.images) else self.chat.text(conversation)

    def lengths(self, texts: Sequence[str], sizes: Sequence[Sequence[Size]]) -> list[int]:
        """Return the number of tokens of each text; some are compared with the tokenizer.

        Raises:
            Inexact: these differ.
        """
        shown = [*map(self.chat.shown, texts, sizes)]
        counts = self._counted([text for text, _ in shown], self._lead)
        found = [count + self._more + more for count, (_, more) in zip(counts, shown, strict=True)]
        for at, text in enumerate(texts):
            if not sizes[at] and self.chat.processor.image_token in text:  # where it is no token, but words
                found[at] = self.chat.lengths([text], [()])[0]
        tried = range(0, len(texts), max(1, len(texts) // _TRIED))
        known = self.chat.lengths([texts[at] for at in tried], [sizes[at] for at in tried])
        if known != [found[at] for at in tried]:
            raise Inexact("the tokenizer")
        return found

    def _asked(self, shape: _Shape, images: int) -> list[str] | str | None:
        """Return what the template writes around the words of an outline, why it refuses, or None for no such thing."""
        marks: list[str] = []
        turns = []
        for role, pieces in shape:
            text = []
            for before, spoken, behind in pieces:
                marks += [_MARK.format(len(marks))] if spoken else []
                text.append(before + (marks[-1] if spoken else "") + behind)
            turns.append(Turn(role, IMAGE.join(text)))  # type: ignore[arg-type]
        try:
            rest = self.chat.text(Conversation("", tuple(turns), (None,) * images))  # type: ignore[arg-type]
        except BadSample as error:
            return str(error)
        found = []
        for mark in marks:
            before, there, rest = rest.partition(mark)
            if not there:
                return None
            found.append(before)
        return [*found, rest]

    def _fitting(self, texts: Sequence[str], images: Sequence[int]) -> tuple[str, int]:
        """Return what stands before a word that follows another, and the tokens that every text has besides."""
        sizes = [[_SIZE] * count for count in images]
        shown = [*map(self.chat.shown, texts, sizes)]
        known = [whole - more for whole, (_, more) in zip(self.chat.lengths(texts, sizes), shown, strict=True)]
        texts = [text for text, _ in shown]
        for lead in ("", " "):
            self._words.clear()
            more = {whole - counted for whole, counted in zip(known, self._counted(texts, lead), strict=True)}
            if len(more) == 1:
                return lead, more.pop()
        raise Inexact("the tokenizer")

    def _counted(self, texts: Sequence[str], lead: str) -> list[int]:
        rows = [_words_of(self._added.split(text), lead) for text in texts]
        counts = [self._sum(row) for row in rows]
        self._learn(set().union(*(row for row, count in zip(rows, counts, strict=True) if count is None)))
        known = self._words.__getitem__
        return [sum(map(known, row)) if count is None else count for row, count in zip(rows, counts, strict=True)]

    def _sum(self, words: list[str]) -> int | None:
        """Return the tokens of words; None where one of them was not counted yet."""
        try:
            return sum(map(self._words.__getitem__, words))
        except KeyError:
            return None

    def _learn(self, words: set[str]) -> None:
        new = [*(words - self._words.keys())]
        if new:
            if len(self._words) > _MOST_WORDS:
                self._words.clear()
                new = [*words]
            # The tokenizer itself: what transformers wraps around it takes longer than a word does.
            found = self.chat.tokenizer.backend_tokenizer.encode_batch(new, add_special_tokens=False)
            self._words |= zip(new, map(len, found), strict=True)


def _words_of(stretches: Sequence[str], lead: str) -> list[str]:
    """Return a text word by word; those behind an added token together with it, which may decide how they begin.

    Args:
        stretches: of text, with an added token between each two.
        lead: what stands before a word that follows another.
    """
    words: list[str] = []
    token = ""
    for at, stretch in enumerate(stretches):
        if at % 2:
            token = stretch
            continue
        if "  " in stretch or "\0" in stretch or stretch.startswith(" ") or stretch.endswith(" "):
            first, *rest = _BETWEEN_WORDS.split(stretch)
            rest = [lead + word for word in rest]
        else:
            first, *rest = stretch.replace(" ", f"\0{lead}").split("\0")
        words.append(token + first)
        words += rest
    return words


def _taken_apart(conversation: Conversation) -> tuple[_Shape, list[str]]:
    """Return the outline of a conversation, and the words that fill it."""
    shape, words = [], []
    for role, text in conversation.turns:
        pieces = []
        for piece in text.split(IMAGE) if role == "user" else [text]:
            spoken = piece.strip()
            if spoken:
                before, _, behind = ("", "", "") if spoken == piece else piece.partition(spoken)
                words.append(spoken)
                pieces.append((before, True, behind))
            else:
                pieces.append((piece, False, ""))
        shape.append((role, tuple(pieces)))
    return tuple(shape), words
