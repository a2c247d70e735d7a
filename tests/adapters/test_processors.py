"""Processors of all vision-language models that ship: counted as written, in the batch as they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from PIL import Image
from transformers.models.smolvlm import processing_smolvlm

from eqat_mm.data.image_text.batching import Collator
from eqat_mm.data.image_text.chat import IGNORED, Chat
from eqat_mm.data.image_text.conversations import Conversation, Turn
from eqat_mm.data.image_text.images import ImageFile
from eqat_mm.data.image_text.quick_lengths import QuickLengths
from eqat_mm.data.image_text.style import Style, apply_style
from eqat_mm.errors import ConfigError
from llava_adapters import known_archs, mistral3, smolvlm
from llava_adapters.tiny_processor import CHAT_TEMPLATE, tiny_processor

MADE = {arch.name: arch.processor for arch in known_archs().values() if arch.processor is not None}
MADE["pixtral"] = lambda: mistral3.processor(1)
SIZES = ((20, 20), (61, 23), (24, 90), (200, 120))
"""Widths and heights."""


def about(count: int) -> Conversation:
    turns = (Turn("user", "<image>" * count + "w5 w6"), Turn("assistant", "w7 w8"), Turn("user", "w9"))
    images = tuple(ImageFile(Path(f"{number}.png")) for number in range(count))
    return Conversation("here", (*turns, Turn("assistant", "w10")), images)


def chat_of(name: str) -> Chat:
    processor = MADE[name]()  # type: ignore[misc]
    apply_style(processor, Style())
    return Chat(processor)


def shown(sizes: tuple[tuple[int, int], ...]) -> list[Any]:
    return [Image.effect_noise(size, 90).convert("RGB") for size in sizes]


@pytest.mark.parametrize("name", sorted(MADE))
def test_tokens_are_counted_as_the_processor_writes_them(name: str) -> None:
    chat = chat_of(name)
    answers = ["w10"] if name == "paligemma" else ["w7", "w8", "w10"]
    for sizes in ((), SIZES[:1], SIZES[1:2], SIZES[2:], SIZES):
        conversation = about(len(sizes))
        sample = chat.encode(conversation, shown(sizes))
        (length,) = chat.lengths([chat.text(conversation)], [[(height, width) for width, height in sizes]])
        assert length == len(sample["input_ids"]) == len(sample["attention_mask"])
        learned = chat.tokenizer.decode(sample["labels"][sample["labels"] != IGNORED])
        assert [word for word in learned.split() if word.startswith("w")] == answers


@pytest.mark.parametrize("name", ["llava_onevision", "qwen2_5_vl", "idefics3"])
def test_the_quick_way_counts_the_same(name: str) -> None:
    chat = chat_of(name)
    talks = [about(number % 3) for number in range(30)]
    quick, texts = QuickLengths(chat, talks), [chat.text(each) for each in talks]
    sizes = [[(height, width) for width, height in SIZES[1 : 1 + len(each.images)]] for each in talks]
    assert quick.lengths(texts, sizes) == chat.lengths(texts, sizes)


def test_a_batch_holds_all_that_each_sample_has() -> None:
    chat = Chat(mistral3.processor())
    samples = [chat.encode(about(len(sizes)), shown(sizes)) for sizes in (SIZES[1:3], (), SIZES[:1])]
    batch = Collator(chat.tokenizer, "left")(samples)
    (first,), (last,) = samples[0]["pixel_values"][:1], samples[2]["pixel_values"]
    assert batch["image_sizes"].tolist() == [*samples[0]["image_sizes"].tolist(), *samples[2]["image_sizes"].tolist()]
    assert torch.equal(batch["pixel_values"][0, :, : first.shape[1], : first.shape[2]], first)
    assert torch.equal(batch["pixel_values"][2, :, : last.shape[1], : last.shape[2]], last)
    assert not batch["pixel_values"][2, :, last.shape[1] :].any()


def test_smolvlm_writes_what_idefics3_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own processor asks for a package that spells numbers, for videos; here one that does nothing."""
    monkeypatch.setattr(processing_smolvlm, "num2words", str)
    monkeypatch.setattr(smolvlm, "find_spec", lambda name: name)
    own, other = Chat(smolvlm.processor()), chat_of("idefics3")
    assert type(own.processor).__name__ == "SmolVLMProcessor"
    images = shown(SIZES[1:3])
    mine, theirs = own.encode(about(2), images), other.encode(about(2), images)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    sizes = [[(height, width) for width, height in SIZES[1:3]]]
    assert own.lengths([own.text(about(2))], sizes) == [len(mine["input_ids"])]


def test_a_processor_that_writes_words_of_its_own_is_refused_by_name() -> None:
    class Wordy(transformers.LlavaProcessor):
        def prepare_inputs_layout(self, images: Any = None, text: Any = None, **kwargs: Any) -> Any:
            return super().prepare_inputs_layout(images=images, text=[f"{each} w2" for each in text], **kwargs)

    made: Any = tiny_processor()
    processor = Wordy(made.image_processor, made.tokenizer, patch_size=8, chat_template=CHAT_TEMPLATE)
    with pytest.raises(ConfigError, match="words of its own") as caught:
        Chat(processor).encode(about(1), shown(SIZES[:1]))
    assert caught.value.where == "processor Wordy"
