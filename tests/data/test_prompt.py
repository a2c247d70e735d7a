"""Prompts are rendered and tokenised in one way: special tokens once, images in their place, errors in four lines."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.processors import TemplateProcessing
from transformers import AutoProcessor, PreTrainedTokenizerFast

from eqat_demo.llava.build import assemble
from eqat_eval.prompts import encode_prompt
from eqat_mm.data.chat import Chat
from eqat_mm.data.conversations import Conversation, Turn
from eqat_mm.data.images import ImageFile
from eqat_mm.data.problems import BadSample
from eqat_mm.data.prompt import Renderer
from eqat_mm.data.vocabulary import start_of
from eqat_mm.errors import ConfigError, DataError, EqatError
from tests.checkpoint.files import assert_four_lines
from tests.data.tiny_processor import MARKED, MISTRAL, VICUNA, llava_next_processor, llava_processor, tiny_tokenizer
from tests.demo.stand_ins import PATCHES, save_language_model, save_parts

IN_ORDER = (
    "{% for m in messages %}{{ m.role + ':' }}{% for p in m.content %}{{ p.text or '<image>' }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)
PLAIN = "{% for m in messages %}{{ m.role + ': ' + m.content + ' ' }}{% endfor %}"
ANSWERING = "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
BOS, EOS = 1, 2


def tokenizer_that_adds(before: str, behind: str, **changes: Any) -> PreTrainedTokenizerFast:
    """The tiny tokenizer with what it puts around every text; `<s>` is 1 and `</s>` is 2."""
    tokenizer = tiny_tokenizer()
    single = " ".join(part for part in (before, "$A", behind) if part)
    special = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<s>", "</s>", "<|end|>")]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, **_names(changes))
    backend = type(tokenizer.backend_tokenizer).from_str(tokenizer.backend_tokenizer.to_str())
    backend.post_processor = TemplateProcessing(single=single, special_tokens=special)  # type: ignore[assignment]
    return PreTrainedTokenizerFast(tokenizer_object=backend, **_names(changes))


def _names(changes: dict[str, Any]) -> dict[str, Any]:
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"} | changes
    return names | {"extra_special_tokens": ["<image>", "<|end|>"]}


def processor_with(tokenizer: PreTrainedTokenizerFast, template: str) -> Any:
    processor = llava_processor(template)
    processor.tokenizer = tokenizer
    return processor


def photos(count: int) -> list[Image.Image]:
    return [Image.new("RGB", (28, 28)) for _ in range(count)]


def spoken(speaker: Any, prompt: str, images: Sequence[Any] = ()) -> str:
    """The rendered text of a prompt."""
    renderer = Renderer(speaker)
    return renderer.text([renderer.asked(prompt, len(images))], answering=True)


# ---- special tokens -------------------------------------------------------------------------------

ADDED = [("<s>", ""), ("", "</s>"), ("<s>", "</s>"), ("", "")]


@pytest.mark.parametrize(("before", "behind"), ADDED, ids=["bos", "eos", "both", "none"])
@pytest.mark.parametrize("start", ["", "<s>", "\n<s>"], ids=["plain", "bos written", "bos behind white space"])
@pytest.mark.parametrize("processes", [False, True], ids=["tokenizer", "processor"])
def test_special_tokens_stand_once(before: str, behind: str, start: str, processes: bool) -> None:
    tokenizer = tokenizer_that_adds(before, behind)
    tokenizer.chat_template = f"{{{{ {start!r} }}}}" + PLAIN + ANSWERING
    template = f"{{{{ {start!r} }}}}" + IN_ORDER
    speaker = processor_with(tokenizer, template) if processes else tokenizer
    ids = encode_prompt(speaker, "what is it?", chat=True)["input_ids"][0].tolist()
    assert ids.count(BOS) == int(bool(before or start))
    assert EOS not in ids
    assert tokenizer.decode(ids).endswith("assistant:")


@pytest.mark.parametrize("chat", [False, True])
def test_a_prompt_that_has_the_first_token_gets_no_other(chat: bool) -> None:
    tokenizer = tokenizer_that_adds("<s>", "")
    tokenizer.chat_template = "{{ messages[0].content }}"
    typed, plain = (encode_prompt(tokenizer, text, chat=chat)["input_ids"][0] for text in ("<s> no", "no"))
    assert typed.tolist().count(BOS) == plain.tolist().count(BOS) == 1


def test_the_rest_is_tokenised_as_if_it_began_the_text() -> None:
    """Not as behind a written `<s>`, where the first word has no space in front of it."""
    tokenizer = tokenizer_that_adds("<s>", "")
    ids = encode_prompt(tokenizer, "sure", chat=False)["input_ids"]
    assert torch.equal(ids, tokenizer("sure", return_tensors="pt")["input_ids"])


@pytest.mark.parametrize("template", [VICUNA, MISTRAL, MARKED], ids=["vicuna", "mistral", "marked"])
@pytest.mark.parametrize("behind", ["</s>", "<|end|>"])
def test_what_the_tokenizer_appends_is_not_learned(template: str, behind: str) -> None:
    turns = (
        Turn("user", "<image>\nwhat?"),
        Turn("assistant", "a cat"),
        Turn("user", "sure?"),
        Turn("assistant", "yes"),
    )
    conversation = Conversation("here", turns, (ImageFile(Path("0.png")),))
    samples, counted = [], []
    for end in (behind, ""):
        chat = Chat(processor_with(tokenizer_that_adds("<s>", end), template))
        samples.append(chat.encode(conversation, photos(1)))
        counted.append(chat.lengths([chat.text(conversation)], [[(28, 28)]]))
    for name in ("input_ids", "labels"):
        assert torch.equal(samples[0][name], samples[1][name])
    assert counted[0] == counted[1] == [len(samples[0]["input_ids"])]


@pytest.mark.parametrize(
    ("before", "behind", "changes", "start"),
    [
        ("<s>", "", {}, (BOS,)),
        ("<s>", "</s>", {}, (BOS,)),
        ("", "</s>", {"bos_token": "</s>"}, ()),
        ("<s> <|end|>", "", {"bos_token": None}, (BOS, 5)),
        ("", "", {}, ()),
    ],
    ids=["bos", "both", "one token for both", "two", "none"],
)
def test_the_start_is_told_from_the_end(before: str, behind: str, changes: dict[str, Any], start: object) -> None:
    assert start_of(tokenizer_that_adds(before, behind, **changes)) == start


def test_a_word_that_the_tokenizer_does_not_have_is_refused() -> None:
    backend = Tokenizer(WordLevel({"yes": 0, "no": 1}))  # without a token for other words
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    assert encode_prompt(tokenizer, "no", chat=False)["input_ids"].tolist() == [[1]]
    with pytest.raises(DataError, match="text that the tokenizer knows") as raised:
        encode_prompt(tokenizer, "maybe", chat=False)
    assert_four_lines(raised.value)


# ---- images ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", [VICUNA, MISTRAL, MARKED, IN_ORDER], ids=["vicuna", "mistral", "marked", "order"])
@pytest.mark.parametrize("prompt", ["<image>\nwhat is it?", "what is it?"], ids=["placed", "not placed"])
def test_a_placed_image_is_one_image(template: str, prompt: str) -> None:
    processor = llava_processor(template)
    ids = encode_prompt(processor, prompt, photos(1), chat=True)["input_ids"][0]
    other = encode_prompt(processor, "what is it?", photos(1), chat=True)["input_ids"][0]
    assert (ids == processor.image_token_id).sum() == 4
    assert torch.equal(ids, other)


@pytest.mark.parametrize("text", ["one <image> two", "<image> is it? <image>", "a\n<image>\nb\n<image>\nc"])
def test_text_around_images_is_kept_where_the_template_keeps_their_place(text: str) -> None:
    expected = f"user:{text}assistant:".replace("<image> is", "<image>is").replace("? <image>a", "?<image>a")
    assert spoken(llava_processor(IN_ORDER), text, photos(text.count("<image>"))) == expected


def test_line_breaks_stay_where_the_template_writes_images_first() -> None:
    """As LLaVA writes the turn in its own training."""
    text = "How many?\n<image>\nAnswer with a number."
    said = spoken(llava_processor(VICUNA), text, photos(1))
    assert said == "USER: <image>\nHow many?\n\nAnswer with a number. ASSISTANT:"
    listed = spoken(llava_processor(VICUNA), "A: <image>\n1. red\n<image>\n2. blue", photos(2))
    assert listed == "USER: <image>\n<image>\nA: \n1. red\n\n2. blue ASSISTANT:"


def test_the_models_own_image_token_places_images_too() -> None:
    processor = llava_processor(IN_ORDER.replace("<image>", "<|end|>"))
    processor.image_token, processor.image_token_id = "<|end|>", 5
    assert spoken(processor, "a <|end|> b <image> c", photos(2)) == "user:a <|end|> b <|end|> cassistant:"


@pytest.mark.parametrize(("text", "count"), [("<image> and <image>", 1), ("<image>", 2), ("<image>", 0)])
def test_more_or_fewer_places_than_images_are_refused(text: str, count: int) -> None:
    with pytest.raises(DataError, match=rf"{text.count('<image>')} <image> in the text for {count} images") as raised:
        encode_prompt(llava_processor(), text, photos(count), chat=True)
    assert_four_lines(raised.value)


@pytest.mark.parametrize("written", ["", "<image><image>"], ids=["lost", "doubled"])
def test_a_template_that_changes_the_number_of_images_is_refused(written: str) -> None:
    processor = llava_processor(VICUNA.replace("<image>", written))
    with pytest.raises(DataError, match="for each of 1 images") as raised:
        encode_prompt(processor, "what?", photos(1), chat=True)
    assert_four_lines(raised.value)


def test_a_language_model_has_no_images_to_place() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = PLAIN
    assert spoken(tokenizer, "<image> is a tag") == "user: <image> is a tag "


WORDS = st.lists(st.sampled_from(["<image>", "\n", " ", "what", "a cat", "<s>", "§", "日"]), min_size=1, max_size=8)


@pytest.mark.parametrize("make", [llava_processor, llava_next_processor], ids=["llava", "llava-next"])
@pytest.mark.parametrize("template", [VICUNA, MISTRAL, MARKED, IN_ORDER], ids=["vicuna", "mistral", "marked", "order"])
@settings(max_examples=25, deadline=None)
@given(words=WORDS)
def test_a_prompt_is_the_beginning_of_what_was_trained(make: Any, template: str, words: list[str]) -> None:
    """What `generate` reads before an answer is what training reads before it."""
    processor, asked = make(template), "".join(words).strip() or "why?"
    images = photos(asked.count("<image>"))
    turns = (Turn("user", asked), Turn("assistant", "yes"))
    chat = Chat(processor)
    conversation = Conversation("here", turns, tuple(ImageFile(Path("0.png")) for _ in images))
    trained = chat.encode(conversation, images)
    prompt = encode_prompt(processor, asked, images, chat=True)["input_ids"][0]
    first = int((trained["labels"] != -100).nonzero()[0])
    assert first in (len(prompt), len(prompt) - 1)  # its last token may have joined the answer
    assert torch.equal(prompt[:first], trained["input_ids"][:first])


# ---- templates that fail --------------------------------------------------------------------------

BROKEN = {
    "syntax": "{% for %}",
    "undefined": "{{ nothing.at.all }}",
    "type": "{{ 'a' + 1 }}",
    "division": "{{ 1 / 0 }}",
    "overflow": "{% for i in range(10 ** 20) %}{% endfor %}",
    "memory": "{{ 'a' * (10 ** 18) }}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "include": "{% include 'other' %}",
    "security": "{{ ''.__class__.__mro__ }}",
    "raised": "{{ raise_exception('not today') }}",
    "filter": "{{ 'a' | nothing }}",
    "key": "{{ messages[7].content }}",
    "surrogate": "{{ '\\ud800' }}",
}


@pytest.mark.parametrize("template", BROKEN.values(), ids=BROKEN)
def test_whatever_fails_in_a_template_is_four_lines(template: str) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    for speaker in (tokenizer, llava_processor(template)):
        with pytest.raises(ConfigError, match="chat template") as raised:
            encode_prompt(speaker, "what?", chat=True)
        assert_four_lines(raised.value)
    conversation = Conversation("here", (Turn("user", "what?"), Turn("assistant", "yes")), ())
    with pytest.raises(BadSample, match="the chat template refuses it"):
        Chat(llava_processor(template)).text(conversation)


PARTS = [
    "{{ messages }}",
    "{% for m in messages %}",
    "{% endfor %}",
    "{{ m.content }}",
    "{{ m.content[0].text }}",
    "\n",
]
PARTS += [
    "<image>",
    "<s>",
    "{{ eos_token }}",
    "{{ m.content | trim }}",
    "{{ range(10**9) | list }}",
    "{{ 1 % 0 }}",
    "日",
]
PARTS += [
    "{% generation %}",
    "{% endgeneration %}",
    "{{ x | tojson }}",
    "\ud83d",
    "{{ raise_exception(m.role) }}",
    "{% if",
]


@settings(max_examples=150, deadline=None)
@given(
    template=st.one_of(st.sampled_from([VICUNA, MISTRAL, MARKED]), st.lists(st.sampled_from(PARTS)).map("".join)),
    prompt=st.one_of(WORDS.map("".join), st.text(st.characters(), max_size=20)),
    count=st.integers(0, 2),
    make=st.sampled_from([tiny_tokenizer, llava_processor, llava_next_processor]),
)
def test_nothing_but_our_errors_comes_out(template: str, prompt: str, count: int, make: Any) -> None:
    speaker = make()
    speaker.chat_template = template
    images = [] if make is tiny_tokenizer else photos(count)
    try:
        ids = encode_prompt(speaker, prompt, images, chat=True)["input_ids"][0].tolist()
    except EqatError as error:
        assert_four_lines(error)
    else:
        assert ids
        assert not images or speaker.image_token_id in ids


LONG = "{% for a in range(99999) %}" * 3 + "X" + "{% endfor %}" * 3


def tokenizer_with(template: str) -> PreTrainedTokenizerFast:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize(
    "template",
    [
        LONG.replace("X", ""),
        "{% set n = namespace(x=0) %}" + LONG.replace("X", "{% set n.x = n.x + 1 %}"),
        "{% macro f() %}" + LONG.replace("X", "") + "{% endmacro %}{{ f() }}",
        LONG.replace("X", "{{ messages[0].content | upper | trim | replace('A', 'B') }}"),
    ],
    ids=["silent", "counting", "in a macro", "with filters"],
)
@pytest.mark.parametrize("make", [tokenizer_with, llava_processor], ids=["tokenizer", "processor"])
def test_a_template_that_does_not_end_is_ended(template: str, make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eqat_mm.data.prompt._PATIENCE", 0.3)
    speaker = make(template)
    began = time.monotonic()
    with pytest.raises(ConfigError, match="TimeoutError") as raised:
        Renderer(speaker).text([Turn("user", "red")])
    assert_four_lines(raised.value)
    assert time.monotonic() - began < 20


def test_a_template_that_does_not_end_is_waited_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not with every sample."""
    monkeypatch.setattr("eqat_mm.data.prompt._PATIENCE", 1.0)
    renderer = Renderer(llava_processor(LONG.replace("X", "")))
    began = time.monotonic()
    for _ in range(100):
        with pytest.raises(ConfigError, match="TimeoutError"):
            renderer.text([Turn("user", "<image>red")])
    assert time.monotonic() - began < 20


@pytest.mark.parametrize("speaker", [tiny_tokenizer(), llava_processor(None)], ids=["tokenizer", "processor"])  # type: ignore[arg-type]
def test_no_template_is_refused(speaker: Any) -> None:
    with pytest.raises(ConfigError, match="no chat template") as raised:
        encode_prompt(speaker, "what?", chat=True)
    assert_four_lines(raised.value)


@pytest.mark.parametrize("chat", [False, True])
def test_half_a_character_is_refused(chat: bool) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = PLAIN
    for speaker in (tokenizer, llava_processor()):
        with pytest.raises(DataError, match="not Unicode") as raised:
            encode_prompt(speaker, "caf\udce9", chat=chat)
        assert_four_lines(raised.value)


# ---- the demo LLaVA -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("demo")
    save_language_model(folder / "language")
    save_parts(folder / "parts")
    assemble(folder / "parts", folder / "language", folder / "llava")
    return AutoProcessor.from_pretrained(folder / "llava")


@pytest.mark.parametrize("prompt", ["what color?", "<image>\nwhat color?", "<image> what color?"])
def test_the_demo_is_asked_as_it_was_trained(demo: Any, prompt: str) -> None:
    assert spoken(demo, prompt, photos(1)) == "USER: <image>\nwhat color? ASSISTANT:"
    inputs = encode_prompt(demo, prompt, photos(1), chat=True)
    assert (inputs["input_ids"] == demo.image_token_id).sum() == PATCHES
    expected = demo(text=["USER: <image>\nwhat color? ASSISTANT:"], images=photos(1), return_tensors="pt")
    assert inputs.keys() == expected.keys()
    assert all(torch.equal(inputs[name], expected[name]) for name in inputs)
