"""Labels are exactly what the model has to write: the answers and the ends of its turns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from eqat_mm.data.image_text.chat import IGNORED, Chat
from eqat_mm.data.image_text.conversations import Conversation, Turn
from eqat_mm.data.image_text.images import ImageFile
from eqat_mm.data.image_text.problems import BadSample
from eqat_mm.errors import ConfigError
from tests.data.tiny_processor import (
    MARKED,
    MISTRAL,
    VICUNA,
    llava_next_processor,
    llava_processor,
    tiny_tokenizer,
)

EACH_TEMPLATE = pytest.mark.parametrize(
    ("template", "end"),
    [(VICUNA, "</s>"), (MISTRAL, "</s>"), (MARKED, "\n<|end|>")],
    ids=["vicuna", "mistral", "marked"],
)


def talk(*texts: str) -> Conversation:
    """A conversation that the user begins, with as many images as it names."""
    turns = tuple(Turn(("user", "assistant")[number % 2], text) for number, text in enumerate(texts))  # type: ignore[arg-type]
    images = tuple(ImageFile(Path(f"{number}.png")) for number in range("".join(texts).count("<image>")))
    return Conversation("here", turns, images)


def pictures(conversation: Conversation, size: tuple[int, int] = (28, 28)) -> list[Image.Image]:
    return [Image.new("RGB", size) for _ in conversation.images]


def predicted(chat: Chat, sample: dict[str, torch.Tensor]) -> list[str]:
    """The text of each unbroken run of labels."""
    runs: list[list[int]] = []
    previous = IGNORED
    for label in sample["labels"].tolist():
        if label != IGNORED:
            if previous == IGNORED:
                runs.append([])
            runs[-1].append(label)
        previous = label
    return [chat.tokenizer.decode(run).strip() for run in runs]


@EACH_TEMPLATE
def test_every_answer_and_its_end_are_labels(template: str, end: str) -> None:
    chat = Chat(llava_processor(template))
    conversation = talk("<image>\nwhat is it?", "a red cat.", "is it big?", "yes", "sure?", "yes")
    sample = chat.encode(conversation, pictures(conversation))
    assert predicted(chat, sample) == [f"a red cat.{end}", f"yes{end}", f"yes{end}"]


@EACH_TEMPLATE
def test_words_of_an_answer_elsewhere_are_no_labels(template: str, end: str) -> None:
    chat = Chat(llava_processor(template))
    sample = chat.encode(talk("yes or no? yes", "no", "ASSISTANT: no </s>", "yes or no"), [])
    assert predicted(chat, sample) == [f"no{end}", f"yes or no{end}"]


@EACH_TEMPLATE
def test_input_is_what_the_template_renders(template: str, end: str) -> None:
    processor = llava_processor(template)
    conversation = talk("what is it?", "a cat.", "sure?", "no")
    messages = [{"role": turn.role, "content": [{"type": "text", "text": turn.text}]} for turn in conversation.turns]
    expected = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")[
        "input_ids"
    ][0]
    ids = Chat(processor).encode(conversation, [])["input_ids"]
    if template == VICUNA:  # its last space makes way for the end of the sequence
        expected[-1] = processor.tokenizer.eos_token_id
    assert torch.equal(ids, expected)
    assert ids.tolist().count(processor.tokenizer.bos_token_id) == 1


def test_labels_are_the_ids_but_for_the_end_of_turns() -> None:
    chat = Chat(llava_processor(VICUNA))
    sample = chat.encode(talk("is it big?", "yes", "sure?", "no"), [])
    ids, labels = sample["input_ids"], sample["labels"]
    (position,) = ((labels != IGNORED) & (labels != ids)).nonzero().flatten().tolist()
    assert labels[position] == chat.tokenizer.eos_token_id
    assert chat.tokenizer.convert_ids_to_tokens(int(ids[position])).startswith("▁USER")  # it took the space in


def test_a_text_that_looks_like_an_end_is_not_one() -> None:
    misspelt = "<\\\\s> "  # as it was published once
    chat = Chat(llava_processor(MISTRAL.replace("</s> ", misspelt)))
    sample = chat.encode(talk("what?", "a cat", "sure?", "yes"), [])
    assert predicted(chat, sample) == ["a cat</s>", "yes</s>"]


def test_an_unknown_word_behind_an_answer_does_not_end_the_turn() -> None:
    chat = Chat(llava_processor(MISTRAL.replace("</s> ", "§ ")))
    sample = chat.encode(talk("what?", "a cat"), [])
    assert predicted(chat, sample) == ["a cat</s>"]
    assert sample["input_ids"].tolist().count(chat.tokenizer.unk_token_id) == 1


@pytest.mark.parametrize("make", [llava_processor, llava_next_processor], ids=["llava", "llava-next"])
def test_images_move_the_labels_along(make: Any) -> None:
    chat = Chat(make(VICUNA))
    texts = ("a <image> and <image> what?", "a cat", "and <image>?", "a cat, too")
    with_images, without = talk(*texts), talk(*(text.replace("<image>", "") for text in texts))
    sample = chat.encode(with_images, pictures(with_images, (40, 90)))
    assert predicted(chat, sample) == ["a cat</s>", "a cat, too</s>"] == predicted(chat, chat.encode(without, []))
    is_image = sample["input_ids"] == chat.processor.image_token_id
    assert sample["labels"][is_image].unique().tolist() == [IGNORED]
    assert len(sample["pixel_values"]) == 3


@pytest.mark.parametrize("size", [(28, 28), (10, 200), (300, 40), (57, 55)], ids=str)
@pytest.mark.parametrize("make", [llava_processor, llava_next_processor], ids=["llava", "llava-next"])
@EACH_TEMPLATE
def test_the_length_is_that_of_the_sample(make: Any, template: str, end: str, size: tuple[int, int]) -> None:
    chat = Chat(make(template))
    conversation = talk("<image> and <image>", "a cat.", "and?", "a dog")
    sample = chat.encode(conversation, pictures(conversation, size))
    sizes = [(size[1], size[0])] * 2
    assert chat.lengths([chat.text(conversation)], [sizes]) == [len(sample["input_ids"])] == [len(sample["labels"])]


def test_images_keep_their_place_among_the_text() -> None:
    in_order = (
        "{% for m in messages %}{% for p in m.content %}{{ p.text or '<image>' }}{% endfor %}{{ ':' }}{% endfor %}"
    )
    chat = Chat(llava_processor(in_order))
    assert chat.text(talk("one <image>\ntwo<image>three", "yes")) == "one <image>\ntwo<image>three:yes:"


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        (VICUNA.replace("part.text", "part.text.upper()"), "does not write the answer"),
        ("{{ raise_exception('not today') }}", "not today"),
        (VICUNA.replace("<image>", "image"), "0 image tokens in the rendered text for 1 images"),
    ],
    ids=["changed text", "refused", "no image"],
)
def test_templates_that_hide_the_answer_are_refused(template: str, problem: str) -> None:
    with pytest.raises(BadSample, match=problem):
        Chat(llava_processor(template)).encode(talk("<image> what?", "a cat"), [Image.new("RGB", (28, 28))])


@pytest.mark.parametrize(
    ("prompt", "written", "learned"),
    [
        ("[assistant]\n", "[assistant] \n", ["red cat.", "big"]),
        ("[assistant]\n<think>\n", "[assistant]\n", ["red cat.", "big"]),
        (
            "[assistant]\n",
            "[assistant]\n<think>\n\n</think>\n",
            ["<think>\n\n</think>\nred cat.", "<think>\n\n</think>\nbig"],
        ),
        ("", "[assistant]\n", ["[assistant]\nred cat.", "[assistant]\nbig"]),
    ],
    ids=["a space less", "a thought begun", "a thought left out", "no prompt"],
)
def test_answers_are_found_where_the_prompt_is_another(prompt: str, written: str, learned: list[str]) -> None:
    template = (
        "{% for message in messages %}"
        "{% if message.role == 'assistant' %}{{ WRITTEN }}{% else %}{{ '[user]\n' }}{% endif %}"
        "{% for part in message.content %}{% if part.type == 'image' %}<image>{% else %}{{ part.text }}{% endif %}"
        "{% endfor %}{{ '<|end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ PROMPT }}{% endif %}"
    )
    template = template.replace("WRITTEN", repr(written)).replace("PROMPT", repr(prompt))
    chat = Chat(llava_processor(template))
    conversation = talk("<image>is it a red cat.", "red cat.", "is red cat. big or what", "big")
    assert predicted(chat, chat.encode(conversation, pictures(conversation))) == [f"{each}<|end|>" for each in learned]


def test_a_turn_of_the_system_comes_first() -> None:
    spoken = talk("what?", "a cat")
    conversation = Conversation("here", (Turn("system", "be kind"), *spoken.turns), ())
    chat = Chat(llava_processor(VICUNA))
    assert chat.text(conversation) == "be kind USER: what? ASSISTANT: a cat</s>"
    with pytest.raises(BadSample, match="user and assistant only"):
        Chat(llava_processor(MISTRAL)).text(conversation)


def _without(part: str) -> Any:
    processor = llava_processor()
    if part == "end-of-sequence token":
        processor.tokenizer.eos_token = None
    else:
        setattr(processor, part, None)
    return processor


@pytest.mark.parametrize("part", ["tokenizer", "image_processor", "chat_template", "end-of-sequence token"])
def test_a_processor_that_lacks_a_part_is_refused(part: str) -> None:
    with pytest.raises(ConfigError, match=f"no {part}"):
        Chat(_without(part))


def test_a_tokenizer_is_no_processor() -> None:
    with pytest.raises(ConfigError, match="no tokenizer, no image_processor"):
        Chat(tiny_tokenizer())
