"""E2E-QP on conversations: the processor is compared with the model before anything is trained."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from eqat_mm.cli import run_command
from eqat_mm.commands.verbs.quantize import RTNJob, rtn
from eqat_mm.quant.spec import QuantSpec
from eqat_mm.runtime.files import read_json, write_json
from tests.checkpoint.files import same_weights
from tests.tiny_llava import save_tiny_llava


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny LLaVA."""
    folder = tmp_path_factory.mktemp("source") / "llava"
    save_tiny_llava(folder, dtype=torch.float32)
    return folder


def packed(source: Path, folder: Path, change: Callable[[Path], None] = lambda _: None) -> Path:
    """Pack a copy of the model whose files have been changed."""
    shutil.copytree(source, folder / "llava")
    change(folder / "llava")
    return rtn(RTNJob(model=str(folder / "llava"), output=folder / "rtn", quant=QuantSpec(4, 32)))


def _as_once(folder: Path) -> None:
    """Lay the processor's files out as before transformers 4.46."""
    stored = read_json(folder / "processor_config.json")
    write_json(folder / "preprocessor_config.json", stored["image_processor"] | {"processor_class": "LlavaProcessor"})
    (folder / "processor_config.json").unlink()


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Conversations about images."""
    folder = tmp_path_factory.mktemp("questions")
    records = []
    for number in range(4):
        Image.new("RGB", (30 + number, 20), (60 * number, 90, 9)).save(folder / f"{number}.png")
        turns = [{"from": "human", "value": f"<image>\nw{5 + number}"}, {"from": "gpt", "value": f"w{9 + number}"}]
        records.append({"id": str(number), "image": f"{number}.png", "conversations": turns})
    (folder / "train.json").write_text(json.dumps(records), encoding="utf-8")
    return folder / "train.json"


def e2e_qp(base: Path, questions: Path, output: Path) -> int:
    return run_command(
        "e2e-qp",
        [
            *("--model", str(base), "--recipe_for", json.dumps([str(base)]), "--quantized", str(base)),
            *("--conversations.source", str(questions), "--output", str(output), "--max_steps", "2"),
            *("--device", "cpu", "--precision", "float32", "--batch_size", "2", "--accumulation", "1"),
        ],
    )


def test_a_processor_without_settings_trains_like_a_whole_one(source: Path, questions: Path, tmp_path: Path) -> None:
    whole, without = packed(source, tmp_path / "a"), packed(source, tmp_path / "b", _as_once)
    assert not (without / "processor_config.json").exists()
    assert e2e_qp(whole, questions, tmp_path / "whole") == e2e_qp(without, questions, tmp_path / "without") == 0
    assert same_weights(tmp_path / "whole" / "model", tmp_path / "without" / "model")


@pytest.mark.parametrize(
    "change", [{"patch_size": 4}, {"vision_feature_select_strategy": "full"}, {"image_token": "w5"}], ids=str
)
def test_a_processor_of_another_model_is_refused(
    source: Path, questions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict[str, object]
) -> None:
    def changed(folder: Path) -> None:
        write_json(folder / "processor_config.json", read_json(folder / "processor_config.json") | change)

    assert e2e_qp(packed(source, tmp_path, changed), questions, tmp_path / "run") == 2
    said = capsys.readouterr().err
    assert "where:   processor and model" in said
    assert "Traceback" not in said
    assert not (tmp_path / "run" / "model").exists()
