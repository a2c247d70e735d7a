"""`demo/train_llava.py` on tiny stand-ins: all stages, and going on where one was stopped."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from itertools import chain
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from eqat_mm.runtime.files import read_json
from tests.demo.stand_ins import save_language_model

pytest.importorskip("peft")
pytest.importorskip("torchvision")

from eqat_demo.llava import build
from eqat_demo.llava import descent as descents
from eqat_demo.llava.descent import Descent, images_of_step
from eqat_demo.llava.language import Plan
from eqat_demo.mini_vqa import captions, labels, vision
from eqat_demo.mini_vqa.bed import MINI
from eqat_demo.mini_vqa.pictures import PARTS, Counts, pictures
from eqat_demo.mini_vqa.scenes import Scene, Thing
from eqat_demo.mini_vqa.words import Written

FEW = Counts(scenes=4, charts=2, words=2)
TINY = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.fixture
def script(repository: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_llava", repository / "demo" / "train_llava.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a bed of eight pictures a part, with a tiny tower."""
    for part in PARTS:
        monkeypatch.setitem(PARTS, part, FEW)
    config = transformers.CLIPVisionConfig(**TINY, image_size=96, patch_size=16)
    monkeypatch.setattr(vision, "CONFIG", config)
    return replace(MINI, config=config, vision_steps=3, plan=Plan(steps=4, images=3, questions=2, rank=2))


def test_all_stages_of_mini_vqa(script: ModuleType, small: Any, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:  # type: ignore[type-arg]
    save_language_model(tmp_path / "language")
    script.run_stages(small, tmp_path / "out", tmp_path / "language")
    found = read_json(tmp_path / "out" / "accuracy.json")
    assert found["questions"] == sum(len(picture.asked) for picture in pictures("test", FEW))
    assert set(found["accuracy"]) == set(found["blind"]) >= {"all", "exist", "word", "word_held_out", "bar_value"}
    model: Any = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "out" / "model")
    assert model.config.image_seq_length == 36
    capsys.readouterr()
    script.run_stages(small, tmp_path / "out", tmp_path / "language")
    assert capsys.readouterr().out.count("finished before") == 4


def test_training_begins_with_parts(script: ModuleType, small: Any, tmp_path: Path) -> None:
    save_language_model(tmp_path / "language")
    script.run_stages(small, tmp_path / "first", tmp_path / "language")
    start = tmp_path / "first" / "parts"
    still = replace(small, plan=replace(small.plan, lora_lr=0.0, projector_lr=0.0))
    script.run_stages(still, tmp_path / "second", tmp_path / "language", start)
    for name in (f"{build.VISION_TOWER}/model.safetensors", build.PROJECTOR, build.LORA):
        first, second = (load_file(parts / name) for parts in (start, tmp_path / "second" / "parts"))
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first), name


# ---- going on ---------------------------------------------------------------------------------------


def descended(kept: Path | None, stop: int | None = None) -> list[torch.Tensor]:
    """Return the weights after ten steps on data that follow from the step; or stop in the middle."""
    torch.manual_seed(0)
    linear = torch.nn.Linear(4, 1)
    descent = Descent({"params": list(linear.parameters()), "lr": 0.1}, steps=10, warmup=2, kept=kept)
    for step in descent.steps("test"):
        if step == stop:
            break
        data = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
        descent.step((linear(data) - data.sum(1, keepdim=True)).square().mean())
    return [parameter.detach().clone() for parameter in linear.parameters()]


def test_a_stopped_descent_ends_where_it_would_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(descents, "_SECONDS_BETWEEN_SAVES", 0)
    whole = descended(None)
    stopped = descended(tmp_path / "state", stop=6)
    assert not torch.equal(stopped[0], whole[0])
    assert all(map(torch.equal, descended(tmp_path / "state"), whole))


def test_what_was_kept_of_another_length_is_not_gone_on_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(descents, "_SECONDS_BETWEEN_SAVES", 0)
    descended(tmp_path / "state", stop=6)
    kept = torch.load(tmp_path / "state", weights_only=True)
    torch.save(kept | {"steps": 20}, tmp_path / "state")
    assert all(map(torch.equal, descended(tmp_path / "state"), descended(None)))
    assert "begins anew" in capsys.readouterr().out


def test_every_image_comes_once_before_any_comes_again() -> None:
    steps = [images_of_step(10, step, 4).tolist() for step in range(6)]
    assert [len(each) for each in steps] == [4, 4, 2] * 2
    assert sorted(chain(*steps[:3])) == sorted(chain(*steps[3:])) == list(range(10))
    assert steps[:3] != steps[3:]


# ---- what the tower is taught -----------------------------------------------------------------------


def test_labels_say_what_is_in_each_square() -> None:
    scene = Scene((Thing("large", "red", "cross", 24, 8), Thing("small", "blue", "circle", 86, 90)))
    found = labels.labels_of(scene)
    assert found.shape == (36, len(labels.KINDS))
    assert found.any(-1).nonzero().flatten().tolist() == [1, 35]
    told = [values[at] for values, at in zip(labels.KINDS.values(), found[1].tolist(), strict=True)]
    assert told == ["red", "cross", "large", "", "", ""]
    word = labels.labels_of(Written("cab", "red", row=2, column=3))
    letters = [[list(labels.KINDS.values())[side][word[at, side]] for side in (3, 4)] for at in (13, 14)]
    assert letters == [["", "c"], ["a", "b"]]


def test_heights_of_the_pieces_add_up() -> None:
    for picture in pictures("test", Counts(0, 5, 0)):
        content: Any = picture.content
        heights = labels.labels_of(content)[:, -1].reshape(6, 6).sum(0)
        assert {bar.column: bar.height for bar in content.bars} == {at: int(h) for at, h in enumerate(heights) if h}


def test_captions_are_the_words_of_a_square(tmp_path: Path) -> None:
    words = captions.told(Scene((Thing("large", "red", "cross", 24, 8),)))
    assert words == [(" nothing",), (" red", " cross", " large", " one", " second"), *[(" nothing",)] * 34]
    told = captions.told(Written("bbc", "red", row=3, column=0))
    assert told[18:20] == [(" red", " b", "b", " four", " first"), (" red", " c", " four", " second")]


def test_the_tower_s_processor_is_the_model_s(tmp_path: Path) -> None:
    from eqat_demo.llava.build import llava_processor

    save_language_model(tmp_path)
    processor = llava_processor(tmp_path, vision.CONFIG).image_processor
    shown = [picture for picture in pictures("test", Counts(2, 1, 1))]
    theirs = processor(images=[picture.image() for picture in shown], return_tensors="pt")["pixel_values"]
    ours = vision.pixels_of([picture.content for picture in shown], processor)
    torch.testing.assert_close(ours, theirs)
