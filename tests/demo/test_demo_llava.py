"""The demo LLaVA: put together from parts, and trained; a tiny language model and tiny parts stand in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from eqat_demo.llava import build
from eqat_demo.llava.build import IMAGE_TOKEN, PROMPT, assemble, demo_llava_folder
from tests.demo.stand_ins import PATCHES, SIZE, SPECIAL, save_language_model, save_parts

image_module = pytest.importorskip("PIL.Image")
pytest.importorskip("torchvision")


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Folders of the parts and of the language model."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("stand-ins")
    save_language_model(root / "language")
    save_parts(root / "parts")
    return root / "parts", root / "language"


@pytest.fixture(scope="module")
def llava(stand_ins: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The assembled folder."""
    folder = tmp_path_factory.mktemp("assembled") / "llava"
    assemble(*stand_ins, folder)
    return folder


def weights(folder: Path, kind: Any) -> dict[str, Tensor]:
    state: dict[str, Tensor] = kind.from_pretrained(folder).state_dict()
    return state


# ---- the folder -----------------------------------------------------------------------------------


def test_the_lora_is_merged_and_all_else_is_as_it_was(llava: Path, stand_ins: tuple[Path, Path]) -> None:
    merged = weights(llava, transformers.AutoModelForImageTextToText)
    base = weights(stand_ins[1], transformers.AutoModelForCausalLM)
    factors = build.load_file(stand_ins[0] / build.LORA)
    for name, expected in base.items():
        path = name.removesuffix(".weight")
        if f"{path}.lora_A" in factors:
            expected = expected + factors[f"{path}.lora_B"].float() @ factors[f"{path}.lora_A"].float()
        prefix = "model.language_model." if name.startswith("model.") else ""
        assert torch.equal(merged[prefix + name.removeprefix("model.")], expected), name


def test_vision_tower_and_projector_are_those_of_the_parts(llava: Path, stand_ins: tuple[Path, Path]) -> None:
    merged = weights(llava, transformers.AutoModelForImageTextToText)
    tower = weights(stand_ins[0] / build.VISION_TOWER, transformers.CLIPVisionModel)
    projector = build.load_file(stand_ins[0] / build.PROJECTOR)
    for prefix, part in (("model.vision_tower.", tower), ("model.multi_modal_projector.", projector)):
        assert {name for name in merged if name.startswith(prefix)} == {prefix + name for name in part}
        for name, tensor in part.items():
            assert torch.equal(merged[prefix + name], tensor.float()), name


def test_it_loads_as_a_float32_llava_without_a_word(llava: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model: Any = transformers.AutoModelForImageTextToText.from_pretrained(llava)
    assert isinstance(model, transformers.LlavaForConditionalGeneration)
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.float32}
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert (model.generation_config.eos_token_id, model.generation_config.pad_token_id) == (2, 2)
    assert "MISSING" not in capsys.readouterr().err


def test_the_image_token_takes_the_place_of_an_unused_one(llava: Path, stand_ins: tuple[Path, Path]) -> None:
    tokenizer, base = (transformers.AutoTokenizer.from_pretrained(each) for each in (llava, stand_ins[1]))
    assert tokenizer.convert_tokens_to_ids(IMAGE_TOKEN) == SPECIAL.index("<jupyter_code>")
    assert len(tokenizer) == len(base)
    assert tokenizer("is it red?")["input_ids"] == base("is it red?")["input_ids"]
    assert (tokenizer.eos_token, tokenizer.pad_token) == (base.eos_token, base.pad_token)


def test_the_processor_gives_every_image_its_tokens(llava: Path) -> None:
    processor: Any = transformers.AutoProcessor.from_pretrained(llava)
    images = [image_module.new("RGB", size, "red") for size in ((32, 32), (80, 50))]
    prompts = [PROMPT.format(question=question) for question in ("what?", "is it?")]
    inputs = processor(images=images, text=prompts, padding=True, return_tensors="pt")
    assert inputs["pixel_values"].shape == (2, 3, SIZE, SIZE)
    assert (inputs["input_ids"] == processor.image_token_id).sum(1).tolist() == [PATCHES, PATCHES]


MESSAGES = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what color?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "red"}]},
    {"role": "user", "content": "sure?"},
]


def test_the_chat_template_writes_the_prompt_of_the_training(llava: Path) -> None:
    processor: Any = transformers.AutoProcessor.from_pretrained(llava)
    asked = PROMPT.format(question="what color?")
    plain = [{"role": "user", "content": "<image>\nwhat color?"}]
    for template in (processor, processor.tokenizer):
        for messages in (MESSAGES[:1], plain):
            text = template.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
            assert text == asked
        text = template.apply_chat_template(MESSAGES, add_generation_prompt=True, tokenize=False)
        assert text == f"{asked} red<|im_end|>USER: sure? ASSISTANT:"


def test_it_answers(llava: Path) -> None:
    accuracy = pytest.importorskip("eqat_demo.llava.accuracy")
    images = [image_module.new("RGB", (SIZE, SIZE), colour) for colour in ("red", "blue")]
    answers = accuracy.generated_answers(llava, images, ["what?", "is there a circle?"])
    assert len(answers) == 2
    assert all(isinstance(answer, str) for answer in answers)


# ---- from the cache -------------------------------------------------------------------------------


@pytest.fixture
def cache(stand_ins: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache; the language model and the parts are the stand-ins."""
    monkeypatch.setattr(build, "PARTS", stand_ins[0])
    monkeypatch.setattr(build, "smollm2_folder", lambda cache: stand_ins[1])
    return tmp_path


def test_the_folder_is_made_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = demo_llava_folder(cache)
    assert (folder / "README.md").read_text() == "card"
    assert (folder / "LICENSE").read_text() == "Apache"
    with monkeypatch.context() as patch:
        patch.setattr(build, "assemble", lambda *_: pytest.fail("assembled a second time"))
        assert demo_llava_folder(cache) == folder


def test_it_is_made_anew_from_other_parts(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    demo_llava_folder(cache)
    save_parts(tmp_path / "other")
    (tmp_path / "other" / build.CARD).write_text("another card")
    monkeypatch.setattr(build, "PARTS", tmp_path / "other")
    assert (demo_llava_folder(cache) / "README.md").read_text() == "another card"


def test_nothing_is_left_of_a_failed_assembly(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("no disk")

    monkeypatch.setattr(build, "assemble", fail)
    with pytest.raises(RuntimeError, match="no disk"):
        demo_llava_folder(cache)
    assert list(cache.iterdir()) == []
