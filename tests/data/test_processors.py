"""A processor takes from the model's configuration what it lacks, and does not contradict it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from PIL import Image
from transformers import AddedToken

from eqat_demo.llava.build import assemble
from eqat_mm.checkpoint.folders import load_processor
from eqat_mm.data.image_text.batching import Collator
from eqat_mm.data.image_text.chat import Chat
from eqat_mm.data.image_text.conversations import Conversation, Turn
from eqat_mm.data.image_text.images import ImageFile
from eqat_mm.data.image_text.processors import fit_processor
from eqat_mm.errors import ConfigError
from llava_adapters import arch_for
from tests.checkpoint.files import assert_four_lines
from tests.demo.stand_ins import save_language_model, save_parts
from tests.tiny_llava import CHAT_TEMPLATE, save_tiny_llava, tiny_processor

SETTINGS = ("patch_size", "vision_feature_select_strategy", "num_additional_image_tokens")
EACH = pytest.mark.parametrize("arch", ["llava", "llava_next"])


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny models by architecture, and the demo LLaVA around stand-ins."""
    folder = tmp_path_factory.mktemp("models")
    for arch in ("llava", "llava_next"):
        save_tiny_llava(folder / arch, arch, dtype=torch.float32)
    save_language_model(folder / "language")
    save_parts(folder / "parts")
    assemble(folder / "parts", folder / "language", folder / "demo")
    return {name: folder / name for name in ("llava", "llava_next", "demo")}


def config_of(folder: Path) -> Any:
    return transformers.AutoConfig.from_pretrained(folder)


def settings_of(processor: Any) -> dict[str, Any]:
    return {name: getattr(processor, name) for name in SETTINGS}


def features(folder: Path, processor: Any) -> tuple[int, int]:
    """Tokens of an image in the text, and features that the model makes of it."""
    found = processor(text=["<image>"], images=[Image.new("RGB", (70, 30))], return_tensors="pt")
    model: Any = transformers.AutoModelForImageTextToText.from_pretrained(folder)
    images = {name: found[name] for name in processor.image_processor.model_input_names}
    with torch.no_grad():
        (made,) = model.get_image_features(**images).pooler_output
    return int((found["input_ids"] == processor.image_token_id).sum()), len(made)


@pytest.mark.parametrize("name", ["llava", "llava_next", "demo"])
def test_a_processor_that_agrees_is_left_alone(folders: dict[str, Path], name: str) -> None:
    processor = load_processor(folders[name])
    before = settings_of(processor)
    fit_processor(processor, config_of(folders[name]))
    assert settings_of(processor) == before
    tokens, made = features(folders[name], processor)
    assert tokens == made


@pytest.mark.parametrize("name", ["llava", "llava_next", "demo"])
@pytest.mark.parametrize("missing", [SETTINGS, *((each,) for each in SETTINGS)], ids="+".join)
def test_what_is_missing_is_the_models(folders: dict[str, Path], name: str, missing: tuple[str, ...]) -> None:
    processor = load_processor(folders[name])
    whole = settings_of(processor)
    for each in missing:
        setattr(processor, each, 0 if each.startswith("num") else None)
    fit_processor(processor, config_of(folders[name]))
    assert settings_of(processor) == whole


@pytest.mark.parametrize(("arch", "strategy"), [("llava", "default"), ("llava", "full"), ("llava_next", "default")])
def test_files_from_before_there_was_a_processor_config(tmp_path: Path, arch: str, strategy: str) -> None:
    """preprocessor_config.json and chat_template.json, as they were published."""
    folder = tmp_path / arch
    save_tiny_llava(folder, arch, dtype=torch.float32)
    stored = json.loads((folder / "processor_config.json").read_text())
    kind = "LlavaProcessor" if arch == "llava" else "LlavaNextProcessor"
    images = stored["image_processor"] | {"processor_class": kind}
    (folder / "preprocessor_config.json").write_text(json.dumps(images))
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": CHAT_TEMPLATE}))
    for name in ("processor_config.json", "chat_template.jinja"):
        (folder / name).unlink(missing_ok=True)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vision_feature_select_strategy": strategy}))
    processor = load_processor(folder)
    assert (processor.patch_size, processor.vision_feature_select_strategy) == (None, None)
    fit_processor(processor, config_of(folder))
    tokens, made = features(folder, processor)
    assert tokens == made
    conversation = Conversation(
        "here", (Turn("user", "<image> w5"), Turn("assistant", "w6")), (ImageFile(Path("a.png")),)
    )
    chat = Chat(processor)
    sample = chat.encode(conversation, [Image.new("RGB", (70, 30))])
    assert chat.lengths([chat.text(conversation)], [[(30, 70)]]) == [len(sample["input_ids"])]


def _change(processor: Any, name: str, value: Any) -> None:
    setattr(processor, name, value)


def _other_token(processor: Any) -> None:
    processor.image_token, processor.image_token_id = "w5", 5


CONTRADICTIONS: dict[str, tuple[Callable[[Any], None], str]] = {
    "patch size": (lambda each: _change(each, "patch_size", 4), "8, as in config.json"),
    "strategy": (lambda each: _change(each, "vision_feature_select_strategy", "full"), "'default', as in config.json"),
    "tokens beside patches": (lambda each: _change(each, "num_additional_image_tokens", 3), "features of it"),
    "image token": (_other_token, "image_token_id of config.json"),
    "no image token": (lambda each: _change(each, "image_token", "<picture>"), "one token <picture>"),
    "size": (
        lambda each: each.image_processor.__dict__.update(
            size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
        ),
        "of this model",
    ),
}


@EACH
@pytest.mark.parametrize(("change", "allowed"), CONTRADICTIONS.values(), ids=CONTRADICTIONS)
def test_contradictions_are_refused(
    folders: dict[str, Path], arch: str, change: Callable[[Any], None], allowed: str
) -> None:
    processor = load_processor(folders[arch])
    change(processor)
    with pytest.raises(ConfigError) as raised:
        fit_processor(processor, config_of(folders[arch]))
    assert_four_lines(raised.value)
    assert allowed in raised.value.allowed


def test_images_that_are_not_cropped_are_refused(folders: dict[str, Path]) -> None:
    processor: Any = load_processor(folders["llava"])
    processor.image_processor.do_center_crop = False
    with pytest.raises(ConfigError, match="image cannot be read") as raised:
        fit_processor(processor, config_of(folders["llava"]))
    assert_four_lines(raised.value)


def test_other_tiles_are_refused(folders: dict[str, Path]) -> None:
    processor: Any = load_processor(folders["llava_next"])
    processor.image_processor.image_grid_pinpoints = [[16, 48], [48, 16]]
    with pytest.raises(ConfigError, match="image_grid_pinpoints") as raised:
        fit_processor(processor, config_of(folders["llava_next"]))
    assert_four_lines(raised.value)


def test_an_image_token_without_a_row_is_refused(folders: dict[str, Path]) -> None:
    config = config_of(folders["llava"])
    config.text_config.vocab_size = 96
    with pytest.raises(ConfigError, match="96 rows") as raised:
        fit_processor(load_processor(folders["llava"]), config)
    assert_four_lines(raised.value)


@pytest.mark.parametrize("kind", ["none", "without a row"])
def test_padding_has_a_row_in_the_embedding(folders: dict[str, Path], kind: str) -> None:
    processor: Any = tiny_processor()
    tokenizer = processor.tokenizer
    tokenizer.pad_token = None
    if kind == "without a row":
        tokenizer.add_special_tokens({"pad_token": AddedToken("<pad>")})
        assert tokenizer.pad_token_id == 97
    fit_processor(processor, config_of(folders["llava"]))
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 1
    rows = [{"input_ids": torch.tensor(ids), "labels": torch.tensor(ids)} for ids in ([5, 6, 7], [8])]
    batch = Collator(tokenizer, "left")(rows)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [1, 1, 8]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]
    assert batch["labels"].tolist() == [[5, 6, 7], [-100, -100, 8]]


@pytest.mark.parametrize("name", ["qwen2_5_vl", "gemma3", "idefics3", "mistral3", "internvl", "llava_onevision"])
def test_the_processor_of_another_model_is_refused(name: str) -> None:
    """Its own is taken in the contract of each adapter."""
    arch = arch_for(name)
    assert arch.processor is not None
    processor, config = arch.processor(), arch.tiny()[0].config
    fit_processor(processor, config)
    config.image_token_id = 7
    with pytest.raises(ConfigError, match=r"image_token_id of config.json \(7\)"):
        fit_processor(processor, config)


def test_more_tokens_than_features_are_found_where_shapes_tell() -> None:
    arch = arch_for("gemma3")
    assert arch.processor is not None
    processor, config = arch.processor(), arch.tiny()[0].config
    config.mm_tokens_per_image = 16
    with pytest.raises(ConfigError, match="16, the model's features") as caught:
        fit_processor(processor, config)
    assert caught.value.given.startswith("4 tokens for an image")
