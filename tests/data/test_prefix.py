"""PaliGemma's conversations: what its own processor gives for a prompt and its `suffix`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from eqat_mm.data.image_text.batching import Collator
from eqat_mm.data.image_text.chat import IGNORED, Chat
from eqat_mm.data.image_text.columns import alone
from eqat_mm.data.image_text.conversations import Conversation, Turn
from eqat_mm.data.image_text.images import ImageFile
from eqat_mm.data.image_text.mixed import Mixed
from eqat_mm.data.image_text.prefix import filling_of
from eqat_mm.data.image_text.prompt import Renderer
from eqat_mm.data.image_text.quick_lengths import QuickLengths
from eqat_mm.data.image_text.style import Style, apply_style
from llava_adapters.paligemma import processor as tiny_processor
from llava_adapters.paligemma import tiny
from llava_adapters.tiny_vlm import noise

LETTERS = "abcdefghijklmnopqrstuvwxyz?.\n▁"


def gemma_processor() -> Any:
    """Return a processor with a tokenizer of Gemma's kind, which puts `<bos>` before plain text."""
    special = {token: place for place, token in enumerate(("<pad>", "<eos>", "<bos>", "<unk>", "<mask>"))}
    pieces = (*special, *LETTERS, "▁c", "▁ca", "▁cat")
    tokenizer: Any = transformers.GemmaTokenizer(
        {piece: place for place, piece in enumerate(pieces)},
        [("▁", "c"), ("▁c", "a"), ("▁ca", "t")],
        add_bos_token=True,
    )
    images: Any = transformers.SiglipImageProcessor(size={"height": 16, "width": 16})
    images.image_seq_length = 4
    return transformers.PaliGemmaProcessor(images, tokenizer)


PROCESSORS = pytest.mark.parametrize("made", [tiny_processor, gemma_processor])


def chat_of(made: Any) -> Chat:
    processor = made()
    assert apply_style(processor, Style()).template == "paligemma"
    return Chat(processor)


def talk(*texts: str) -> Conversation:
    turns = tuple(Turn(("user", "assistant")[place % 2], text) for place, text in enumerate(texts))
    return Conversation("here", turns, tuple(ImageFile(Path("a.png")) for _ in range(texts[0].count("<image>"))))


def pictures(count: int) -> list[Any]:
    return noise([(20 + 9 * place, 30) for place in range(count)])


def given(processor: Any, images: int, text: str, **suffix: Any) -> dict[str, Tensor]:
    tensors = {"images": pictures(images), "images_kwargs": {"return_tensors": "pt"}}
    found = processor(text=["<image>" * images + text], **tensors, **suffix)
    return {name: torch.as_tensor(value) for name, value in found.items()}


@PROCESSORS
@pytest.mark.parametrize("images", [1, 2])
def test_a_sample_is_what_the_processor_gives_for_prompt_and_suffix(made: Any, images: int) -> None:
    sample = chat_of(made).encode(talk("<image>\n" * images + "is it a cat? ", " a cat.\n"), pictures(images))
    told = given(made(), images, "is it a cat?", suffix=["a cat."])
    assert sample.keys() == told.keys()
    for name, value in alone(sample).items():
        assert torch.equal(value, told[name]), name


@PROCESSORS
def test_a_prompt_in_use_is_what_the_processor_gives(made: Any) -> None:
    renderer = Renderer(chat_of(made).processor)
    found = renderer.inputs(renderer.text([Turn("user", "<image>a cat")], answering=True), pictures(1))
    told = given(made(), 1, "a cat")
    assert all(torch.equal(value, told[name]) for name, value in alone(found).items())


def test_another_reader_of_the_template_gets_the_same() -> None:
    processor = chat_of(gemma_processor).processor
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "a cat"}]}
    text = processor.apply_chat_template([message], add_generation_prompt=True)
    assert text == "<image>a cat"
    (ids,) = processor(text=[text], images=pictures(1))["input_ids"]
    renderer = Renderer(processor)
    prompt = renderer.text([Turn("user", "<image>a cat")], answering=True)
    assert ids == renderer.inputs(prompt, pictures(1))["input_ids"].tolist()


@pytest.mark.parametrize(("said", "read"), [("a cat", "a▁cat"), ("<image>a", "?image?a")], ids=["words", "<image>"])
def test_without_an_image_there_is_a_prompt_too(said: str, read: str) -> None:
    chat = chat_of(gemma_processor)
    conversation = Conversation("here", (Turn("user", said), Turn("assistant", "b")), ())
    sample = chat.encode(conversation, [])
    found = chat.tokenizer.convert_ids_to_tokens(sample["input_ids"])
    assert "".join(found).replace("<unk>", "?") == f"<bos>{read}\nb<eos>"
    assert sample["token_type_ids"].tolist() == [0] * (len(found) - 2) + [1, 1]
    assert chat.lengths([chat.text(conversation)], [()]) == [len(found)]


@PROCESSORS
def test_the_beginning_of_text_is_there_once(made: Any) -> None:
    chat = chat_of(made)
    for images in (0, 1):
        ids = chat.encode(talk("<image>" * images + "a cat", "a"), pictures(images))["input_ids"].tolist()
        assert ids.count(chat.tokenizer.bos_token_id) == 1


def test_of_several_turns_the_last_answer_is_learned_and_the_rest_is_prompt() -> None:
    chat = chat_of(tiny_processor)
    sample = chat.encode(talk("<image>w2", "w3", "w4", "w5 w6"), pictures(1))
    learned = sample["labels"] != IGNORED
    assert chat.tokenizer.decode(sample["labels"][learned]) == "w5 w6 </s>"
    assert torch.equal(learned.long(), sample["token_type_ids"])
    assert chat.text(talk("<image>w2", "w3", "w4", "w5 w6")) == "<image><bos>w2\nw3\nw4\nw5 w6</s>"


def test_the_quick_way_counts_the_same() -> None:
    chat = chat_of(gemma_processor)
    talks = [talk("<image>\n" * (n % 3) + "is it " * n + "a cat?", "a cat. " * (n + 1), "a?", "b") for n in range(12)]
    sizes = [[(30, 40)] * len(each.images) for each in talks]
    texts = [chat.text(each) for each in talks]
    assert QuickLengths(chat, talks).lengths(texts, sizes) == chat.lengths(texts, sizes)


def test_text_among_conversations_does_not_see_what_comes() -> None:
    chat, (model, _) = chat_of(tiny_processor), tiny()
    window = torch.arange(5, 17)
    sample = chat.encode(talk("<image>w2", "w3"), pictures(1))

    class Talks(list[Any]):
        lengths, text_only = (len(sample["input_ids"]),), (False,)

    data = Mixed(Talks([sample]), window.unsqueeze(0))
    collate = Collator(chat.tokenizer, "right", filling_of(chat.processor))
    together = _logits(model, collate([data[0], data[1]]))
    torch.testing.assert_close(together[1, : len(window)], _logits(model, {"input_ids": window.unsqueeze(0)})[0])
    torch.testing.assert_close(together[0, : len(sample["input_ids"])], _logits(model, collate([data[0]]))[0])


@torch.no_grad()
def _logits(model: Any, given: dict[str, Tensor]) -> Tensor:
    logits: Tensor = model(**{name: value for name, value in given.items() if name != "labels"}, use_cache=False).logits
    return logits
