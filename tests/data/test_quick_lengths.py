"""The quick way gives what template and tokenizer give, or says that it cannot."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from eqat_mm.data.image_text.chat import Chat
from eqat_mm.data.image_text.conversations import Conversation, Turn
from eqat_mm.data.image_text.images import ImageFile
from eqat_mm.data.image_text.problems import BadSample, Inexact
from eqat_mm.data.image_text.quick_lengths import QuickLengths
from tests.data.tiny_processor import MARKED, MISTRAL, VICUNA, llava_next_processor, llava_processor

_WORDS = [
    "a",
    "red",
    "cat",
    "is",
    "it",
    "big?",
    "yes",
    "Ünicode",
    "1,234",
    "</s>",
    "<s>",
    "two\nlines",
    "x  y",
    "\t",
    "。",
]
Processor = Callable[[str], Any]


def conversations(count: int) -> list[Conversation]:
    draw = random.Random(0)
    return [_conversation(draw) for _ in range(count)]


def _conversation(draw: random.Random) -> Conversation:
    def words() -> str:
        return "w " + draw.choice([" ", " ", " ", "\n"]).join(draw.choices(_WORDS, k=draw.randint(1, 30)))

    images = draw.choice([0, 1, 1, 2])
    asked = [words(), words()]
    for _ in range(images):
        asked[0] = draw.choice([f"<image>\n{asked[0]}", f"{asked[0]}\n<image>", f"<image>{asked[0]}"])
    turns = [Turn("user", asked[0]), Turn("assistant", words().strip())]
    if draw.random() < 0.5:
        turns += [Turn("user", asked[1].strip()), Turn("assistant", words().strip())]
    return Conversation("", tuple(turns), tuple(ImageFile(Path(f"{number}.png")) for number in range(images)))


@pytest.mark.parametrize(
    "make",
    [
        lambda: llava_processor(VICUNA),
        lambda: llava_processor(MISTRAL),
        lambda: llava_processor(MARKED),
        llava_next_processor,
    ],
    ids=["vicuna", "mistral", "marked", "next"],
)
def test_it_gives_what_template_and_tokenizer_give(make: Callable[[], Any]) -> None:
    chat, samples = Chat(make()), conversations(300)
    sizes = [[(30 + 10 * at, 90) for at in range(len(each.images))] for each in samples]
    quick = QuickLengths(chat, samples[:100])
    texts = [quick.text(each) for each in samples]
    assert texts == [chat.text(each) for each in samples]
    assert quick.lengths(texts, sizes) == chat.lengths(texts, sizes)


def test_it_asks_neither_for_what_it_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    chat, samples = Chat(llava_processor()), conversations(100)
    quick = QuickLengths(chat, samples)
    asked: list[Any] = []
    monkeypatch.setattr(Chat, "text", lambda chat, conversation: asked.append(conversation))
    assert all(isinstance(quick.text(each), str) for each in samples)
    assert asked == []


def test_image_in_a_text_without_images_is_words() -> None:
    chat = Chat(llava_processor())
    written = Conversation("", (Turn("user", "write <image> here"), Turn("assistant", "an <image>")), ())
    quick = QuickLengths(chat, conversations(50))
    text = quick.text(written)
    assert text == chat.text(written)
    assert quick.lengths([text], [()]) == chat.lengths([text], [()]) == [len(chat.encode(written, [])["input_ids"])]


def test_a_template_that_reads_the_words_is_found_out() -> None:
    reading = VICUNA.replace("part.text + gap", "part.text | replace('cat', 'dog') + gap")
    with pytest.raises(Inexact, match="template"):
        QuickLengths(Chat(llava_processor(reading)), conversations(50))


def test_a_template_that_refuses_is_a_bad_sample() -> None:
    quick = QuickLengths(Chat(llava_processor(MISTRAL)), conversations(50))
    refused = Conversation("", (Turn("system", "be nice"), Turn("user", "a"), Turn("assistant", "b")), ())
    for _ in range(2):
        with pytest.raises(BadSample, match="user and assistant only"):
            quick.text(refused)


def test_a_tokenizer_that_joins_words_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def joining(chat: Chat, texts: list[str], sizes: Any) -> list[int]:
        return [length - text.count(" a ") for length, text in zip(counted(chat, texts, sizes), texts, strict=True)]

    counted = Chat.lengths
    monkeypatch.setattr(Chat, "lengths", joining)
    with pytest.raises(Inexact, match="tokenizer"):
        QuickLengths(Chat(llava_processor()), conversations(100))


def test_a_tokenizer_that_joins_a_few_words_is_found_out_later(monkeypatch: pytest.MonkeyPatch) -> None:
    chat, samples = Chat(llava_processor()), conversations(40)
    quick = QuickLengths(chat, samples)
    texts = [quick.text(each) for each in samples]
    counted = Chat.lengths
    monkeypatch.setattr(Chat, "lengths", lambda chat, texts, sizes: [n + 1 for n in counted(chat, texts, sizes)])
    with pytest.raises(Inexact, match="tokenizer"):
        quick.lengths(texts, [()] * 40)
