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
from eqat_mm.train.rtn import run_rtn
from llava_adapters import arch_for, arch_of_folder
from tests.checkpoint.files import assert_four_lines
from tests.tiny_llava import save_tiny_llava
from tests.tiny_model import save_tiny

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
