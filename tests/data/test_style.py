"""The published conversation of LLaVA-1.5, token for token, and its images, pixel for pixel."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from jinja2 import TemplateError
from PIL import Image

from eqat_mm.data.image_text.chat import Chat
from eqat_mm.data.image_text.prompt import Renderer
from eqat_mm.data.image_text.style import TEMPLATES, Style, apply_style, template_text
from eqat_mm.errors import ConfigError, DataError
from eqat_mm.runtime.files import write_json
from tests.checkpoint.files import assert_four_lines
from tests.data.published import SYSTEM, llama_tokenizer, published, records
from tests.data.records import read_records
from tests.data.tiny_processor import MARKED, MISTRAL, TILES, VICUNA
from tests.tiny_llava import processor_of

SIDE = 28
PHOTO = Image.fromarray(np.arange(40 * 24 * 3, dtype=np.uint32).reshape(24, 40, 3).astype(np.uint8))


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return llama_tokenizer()


def speaker(tokenizer: Any, template: str = VICUNA, tiles: Any = None) -> Any:
    return processor_of(tokenizer, template, side=SIDE, patch=14, tiles=tiles)


@pytest.mark.parametrize("tiles", [None, TILES], ids=["llava", "llava-next"])
def test_ids_and_labels_are_those_of_the_published_format(tokenizer: Any, tmp_path: Path, tiles: Any) -> None:
    processor = speaker(tokenizer, tiles=tiles)
    assert apply_style(processor, Style()).template == "vicuna_v1"
    chat, rows = Chat(processor), records(200)
    write_json(tmp_path / "records.json", rows)
    stored = read_records(str(tmp_path / "records.json"))
    for index, row in enumerate(rows):
        conversation = stored.conversation(index)
        photos = [PHOTO for _ in conversation.images]
        sample = chat.encode(conversation, photos)
        image = [processor.image_token_id] * int((sample["input_ids"] == processor.image_token_id).sum())
        expected = published(row, tokenizer, image)
        assert sample["input_ids"].tolist() == expected.ids, row
        assert sample["labels"].tolist() == expected.labels, row
        assert chat.lengths([chat.text(conversation)], [[(24, 40)] * len(photos)]) == [len(expected.ids)]


def said(processor: Any, *turns: tuple[str, Any]) -> str:
    messages = [{"role": role, "content": content} for role, content in turns]
    return str(processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))


def words(*parts: str) -> list[dict[str, str]]:
    return [{"type": "image"} if part == "<image>" else {"type": "text", "text": part} for part in parts]


def test_the_system_may_say_something_else(tokenizer: Any) -> None:
    processor = speaker(tokenizer)
    apply_style(processor, Style("vicuna_v1"))
    assert said(processor, ("user", words("a"))) == f"{SYSTEM} USER: a ASSISTANT:"
    assert said(processor, ("system", "Be brief."), ("user", "a")) == "Be brief. USER: a ASSISTANT:"
    assert said(processor, ("system", words("")), ("user", "a")) == "USER: a ASSISTANT:"


def test_images_come_first_whatever_reads_the_template(tokenizer: Any) -> None:
    processor = speaker(tokenizer)
    apply_style(processor, Style("vicuna_v1"))
    turn = said(processor, ("system", ""), ("user", words("A:\n", "<image>", "\n1.\n", "<image>", " \n2. \n")))
    assert turn == "USER: <image>\n<image>\nA:\n\n1.\n \n2. ASSISTANT:"
    assert said(processor, ("system", ""), ("user", words("<image>"))) == "USER: <image> ASSISTANT:"


@pytest.mark.parametrize("role", ["system", "tool"])
def test_who_speaks_out_of_turn_is_refused(tokenizer: Any, role: str) -> None:
    processor = speaker(tokenizer)
    apply_style(processor, Style("vicuna_v1"))
    with pytest.raises(TemplateError, match="the system speaks first"):
        said(processor, ("user", "a"), (role, "b"))


def test_the_hubs_own_conversation_has_a_name(tokenizer: Any) -> None:
    hub, named = speaker(tokenizer), speaker(tokenizer, MARKED)
    apply_style(named, Style("llava_hf"))
    turns = [("system", words("b")), ("user", words("q", "<image>")), ("assistant", words("a")), ("user", words("r"))]
    assert said(named, *turns) == said(hub, *turns) == "b USER: <image>\nq ASSISTANT: a USER: r ASSISTANT:"
    assert apply_style(named, Style()).template == "vicuna_v1"


@pytest.mark.parametrize(
    ("template", "tiles", "expected"),
    [
        (VICUNA, None, Style("vicuna_v1", "pad")),
        (VICUNA, TILES, Style("vicuna_v1", "model")),
        (MISTRAL, TILES, Style("model", "model")),
        (MARKED, None, Style("model", "model")),
        ("{% for %}", None, Style("model", "model")),
    ],
    ids=["llava-1.5", "llava-1.6-vicuna", "llava-1.6-mistral", "another", "broken"],
)
def test_auto_is_what_the_model_was_trained_with(tokenizer: Any, template: str, tiles: Any, expected: Style) -> None:
    processor = speaker(tokenizer, template, tiles)
    assert apply_style(processor, Style()) == expected
    other = speaker(tokenizer, template, tiles)
    assert apply_style(other, Style().stored) == Style("model", "model")
    assert other.chat_template == template


def test_one_can_be_chosen_and_the_other_left(tokenizer: Any) -> None:
    assert apply_style(speaker(tokenizer), Style("model")) == Style("model", "pad")
    assert apply_style(speaker(tokenizer), Style(images="crop")) == Style("vicuna_v1", "crop")


# ---- images ---------------------------------------------------------------------------------------


def pixels(tokenizer: Any, shape: Any, photo: Any) -> torch.Tensor:
    processor = speaker(tokenizer)
    apply_style(processor, Style("model", shape))
    found: torch.Tensor = Renderer(processor).inputs("<image>", [photo])["pixel_values"]
    return found


@pytest.mark.parametrize("size", [(60, 28), (28, 60), (61, 30), (100, 99)], ids=str)
def test_padded_images_are_squares_in_the_mean_colour(tokenizer: Any, size: tuple[int, int]) -> None:
    """Against Pillow's own resizing, which may round a value to its neighbour."""
    photo = PHOTO.resize(size, Image.Resampling.BILINEAR)
    means = transformers.CLIPImageProcessor().image_mean
    deviations = transformers.CLIPImageProcessor().image_std
    square = Image.new("RGB", (max(size), max(size)), tuple(int(255 * mean) for mean in means))
    square.paste(photo, ((max(size) - size[0]) // 2, (max(size) - size[1]) // 2))
    shown = np.asarray(square.resize((SIDE, SIDE), Image.Resampling.BICUBIC)) / 255
    expected = torch.tensor((shown - means) / deviations).permute(2, 0, 1)[None]
    assert (pixels(tokenizer, "pad", photo) - expected).abs().max() < 1.5 / 255 / min(deviations)
    assert (pixels(tokenizer, "crop", photo) - expected).abs().max() > 0.3


def test_squares_are_the_same_in_every_shape(tokenizer: Any) -> None:
    photo = PHOTO.resize((57, 57))
    assert torch.equal(pixels(tokenizer, "pad", photo), pixels(tokenizer, "model", photo))


def test_crop_is_what_the_hub_does(tokenizer: Any) -> None:
    assert torch.equal(pixels(tokenizer, "crop", PHOTO), pixels(tokenizer, "model", PHOTO))


@pytest.mark.parametrize("shape", ["pad", "crop"])
def test_tiles_have_no_other_shape(tokenizer: Any, shape: Any) -> None:
    with pytest.raises(ConfigError, match=r"LLaVA-1\.6 pads its tiles") as raised:
        apply_style(speaker(tokenizer, tiles=TILES), Style(images=shape))
    assert_four_lines(raised.value)


# ---- templates ------------------------------------------------------------------------------------


def test_a_template_of_ones_own(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "mine.jinja"
    path.write_text("{{ 'mine' }}", encoding="utf-8")
    processor = speaker(tokenizer)
    assert apply_style(processor, Style(str(path))) == Style(str(path), "pad")
    assert said(processor, ("user", "a")) == "mine"


@pytest.mark.parametrize("name", ["vicuna", "", "chat_template.json", "no such.jinja", "a\0.jinja", "~nobody/a.jinja"])
def test_a_template_that_is_none_is_refused(name: str) -> None:
    with pytest.raises((ConfigError, DataError)) as raised:
        template_text(name)
    assert_four_lines(raised.value)


def test_a_shape_that_is_none_is_refused() -> None:
    with pytest.raises(ConfigError, match="auto, pad, crop, model") as raised:
        Style(images="square")  # type: ignore[arg-type]
    assert_four_lines(raised.value)


def test_a_template_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="UTF-8"):
        template_text(str(tmp_path / "a.jinja"))


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_template_that_comes_with_the_package_answers(tokenizer: Any, name: str) -> None:
    processor = speaker(tokenizer, template_text(name))
    assert said(processor, ("user", "a")).endswith("a" if name == "paligemma" else "USER: a ASSISTANT:")
