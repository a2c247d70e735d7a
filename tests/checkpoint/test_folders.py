"""What a model folder holds, as it is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from eqat_mm.blocks.source import open_model
from eqat_mm.checkpoint.folders import load_for_inference, load_processor, load_tokenizer
from eqat_mm.errors import CheckpointError
from eqat_mm.quant.spec import QuantSpec
from eqat_mm.runtime.files import read_json, write_json
from eqat_mm.train.rtn import run_rtn
from llava_adapters import arch_for, arch_of_folder
from tests.checkpoint.files import assert_four_lines
from tests.tiny_llava import save_tiny_llava
from tests.tiny_model import save_tiny, word_tokenizer

CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=["llava", "llava_next"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny LLaVA."""
    made = tmp_path_factory.mktemp("llava")
    save_tiny_llava(made, request.param)
    return made


def test_a_vision_language_model_is_loaded_and_its_packed_twin(folder: Path, tmp_path: Path) -> None:
    full = load_for_inference(folder, CPU)
    assert type(full).__name__ in ("LlavaForConditionalGeneration", "LlavaNextForConditionalGeneration")
    assert {parameter.dtype for parameter in full.parameters()} == {torch.float32}
    assert not full.training
    assert not any(parameter.requires_grad for parameter in full.parameters())
    run_rtn(open_model(folder, arch_of_folder(folder)), QuantSpec(), tmp_path, source="tiny", provenance={})
    packed = load_for_inference(tmp_path / "model", CPU)
    assert isinstance(packed, type(full))
    assert type(packed).__name__ == type(full).__name__


def test_a_processor_makes_what_the_model_reads(folder: Path) -> None:
    processor = load_processor(folder)
    images = [torch.randint(0, 256, (3, height, 20), dtype=torch.uint8) for height in (12, 20, 30)]
    chats: list[Any] = [
        [{"role": "user", "content": [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "w5"}]}],
        [{"role": "user", "content": [{"type": "text", "text": "w6 w7"}, {"type": "image"}]}],
        [{"role": "user", "content": [{"type": "text", "text": "w8"}]}],
    ]
    texts = [processor.apply_chat_template(chat, add_generation_prompt=True) for chat in chats]
    inputs = processor(images=images, text=texts, padding=True, return_tensors="pt")
    logits = load_for_inference(folder, CPU)(**inputs).logits
    assert logits.shape[:2] == inputs["input_ids"].shape
    assert logits.isfinite().all()


def test_the_tokenizer_of_a_vision_language_model(folder: Path) -> None:
    assert load_tokenizer(folder).convert_tokens_to_ids("<image>") == 96


BROKEN = {
    "empty": b"",
    "cut off": b'{"version": "1.0", ',
    "a list": b"[]",
    "deep": b"[" * 100_000,
    "Latin-1": b'{"a": "\xe9"}',
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=list(BROKEN))
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_broken_files_of_a_tokenizer(tmp_path: Path, name: str, content: bytes) -> None:
    tiny = save_tiny(tmp_path)
    (tiny.folder / name).write_bytes(content)
    with pytest.raises(CheckpointError, match="no usable tokenizer") as caught:
        load_tokenizer(tiny.folder)
    assert_four_lines(caught.value)
    assert caught.value.where == str(tiny.folder)


@pytest.mark.parametrize(
    "change",
    [
        {"model": None},
        {"model": {"type": "nope"}},
        {"model": {"type": "WordLevel", "vocab": {"a": -1}, "unk_token": "<unk>"}},
        {"model": {"type": "BPE", "vocab": {}, "merges": ["a"]}},
        {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False}},
        {"added_tokens": 3},
    ],
    ids=str,
)
def test_a_contradictory_tokenizer(tmp_path: Path, change: dict[str, Any]) -> None:
    tiny = save_tiny(tmp_path)
    path = tiny.folder / "tokenizer.json"
    write_json(path, read_json(path) | change)
    with pytest.raises(CheckpointError, match="no usable tokenizer") as caught:
        load_tokenizer(tiny.folder)
    assert_four_lines(caught.value)


def test_the_tokenizer_of_another_model(tmp_path: Path) -> None:
    """It has more tokens than the embedding has rows; what was added to it does not count."""
    tiny = save_tiny(tmp_path)
    tokenizer = word_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.save_pretrained(tiny.folder)
    assert len(load_tokenizer(tiny.folder)) == 98
    config = read_json(tiny.folder / "config.json")
    write_json(tiny.folder / "config.json", config | {"vocab_size": 96})
    with pytest.raises(CheckpointError, match="97 tokens for a model that knows 96") as caught:
        load_tokenizer(tiny.folder)
    assert_four_lines(caught.value)


@pytest.mark.parametrize("content", BROKEN.values(), ids=list(BROKEN))
@pytest.mark.parametrize("name", ["processor_config.json", "tokenizer.json"])
def test_broken_files_of_a_processor(tmp_path: Path, name: str, content: bytes) -> None:
    save_tiny_llava(tmp_path)
    assert (tmp_path / name).is_file()
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match="no usable processor") as caught:
        load_processor(tmp_path)
    assert_four_lines(caught.value)


def test_a_language_model_has_no_processor(tmp_path: Path) -> None:
    tiny = save_tiny(tmp_path)
    with pytest.raises(CheckpointError, match="text-only") as caught:
        load_processor(tiny.folder)
    assert_four_lines(caught.value)
    assert caught.value.where == str(tiny.folder)
    assert "eqat-mm[vlm]" in caught.value.do


def test_a_folder_without_processor_files(tmp_path: Path) -> None:
    model, _ = arch_for("llava").tiny()
    model.save_pretrained(tmp_path)  # type: ignore[operator]
    with pytest.raises(CheckpointError, match="no usable processor") as caught:
        load_processor(tmp_path)
    assert_four_lines(caught.value)
