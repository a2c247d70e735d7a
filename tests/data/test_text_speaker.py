"""Conversations of a language model: a tokenizer where a processor would be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from eqat_mm.data.image_text import preparing
from eqat_mm.data.image_text.chat import IGNORED, Chat
from eqat_mm.data.image_text.conversations import Conversation, Turn
from eqat_mm.data.image_text.problems import BadSample
from eqat_mm.data.image_text.samples import image_text_data
from eqat_mm.data.image_text.settings import ImageTextData
from eqat_mm.data.image_text.text_speaker import TextSpeaker
from eqat_mm.errors import ConfigError, DataError
from tests.checkpoint.files import assert_four_lines
from tests.tiny_model import word_tokenizer

TEMPLATE = (
    "{% for message in messages %}{{ 'w10 ' if message.role == 'user' else 'w11 ' }}{{ message.content + ' ' }}"
    "{{ '</s> ' if message.role == 'assistant' else '' }}{% endfor %}{{ 'w11 ' if add_generation_prompt else '' }}"
)
"""Takes text alone, as templates of language models do."""


def speaker() -> TextSpeaker:
    tokenizer = word_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return TextSpeaker(tokenizer)


def said(*texts: str) -> Conversation:
    roles = ("user", "assistant") * len(texts)
    return Conversation("here", tuple(Turn(role, text) for role, text in zip(roles, texts, strict=False)), ())  # type: ignore[arg-type]


def test_answers_and_ends_of_turns_are_labels() -> None:
    chat, talk = Chat(speaker()), said("w5 w6", "w7 w8", "w9", "w12")
    sample = chat.encode(talk, [])
    assert sample.keys() == {"input_ids", "labels"}
    assert sample["input_ids"].tolist() == [10, 5, 6, 11, 7, 8, 1, 10, 9, 11, 12, 1]
    no = IGNORED
    assert sample["labels"].tolist() == [no, no, no, no, 7, 8, 1, no, no, no, 12, 1]
    assert chat.lengths([chat.text(talk)], [()]) == [12]


def test_a_word_for_images_is_a_word() -> None:
    chat = Chat(speaker())
    sample = chat.encode(said("<image> w6", "w7"), [])
    assert sample["input_ids"].tolist() == [10, 0, 6, 11, 7, 1]
    assert chat.lengths([chat.text(said("<image> w6", "w7"))], [()]) == [6]


def test_images_are_refused() -> None:
    shown = Conversation("here", said("<image> w6", "w7").turns, ("a.png",))  # type: ignore[arg-type]
    with pytest.raises(BadSample, match="this model sees none"):
        Chat(speaker()).text(shown)


def test_a_tokenizer_without_template_is_refused() -> None:
    with pytest.raises(ConfigError, match="no chat_template") as raised:
        Chat(TextSpeaker(word_tokenizer()))
    assert_four_lines(raised.value)
    assert "--conversations.template" in raised.value.do


@pytest.mark.parametrize("few", [0, 2048], ids=["quick", "exact"])
def test_lengths_are_those_of_the_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, few: int) -> None:
    monkeypatch.setattr(preparing, "_FEW", few)
    records = [
        {"conversations": [{"from": "human", "value": "w5 " * (index + 1)}, {"from": "gpt", "value": "w6 <image> w7"}]}
        for index in range(7)
    ]
    (tmp_path / "a.json").write_text(json.dumps(records), encoding="utf-8")
    data = image_text_data(speaker(), ImageTextData(source=str(tmp_path / "a.json"), max_length=11))
    assert data.text_only == [True] * 7
    assert data.lengths == [len(data[index]["input_ids"]) for index in range(7)] == [7, 8, 9, 10, 11, 11, 11]


def test_a_record_about_an_image_is_a_bad_sample(tmp_path: Path) -> None:
    from PIL import Image

    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    turns = [{"from": "human", "value": "<image>\nw5"}, {"from": "gpt", "value": "w6"}]
    (tmp_path / "a.json").write_text(json.dumps([{"image": "a.png", "conversations": turns}]), encoding="utf-8")
    with pytest.raises(DataError, match="1 images, and this model sees none"):
        image_text_data(speaker(), ImageTextData(source=str(tmp_path / "a.json")))
