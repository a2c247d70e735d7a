"""`eqat prepare-data`: one pass, whose index the training of a packed copy of the model then uses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from eqat_mm.cli import run_command
from eqat_mm.commands.verbs.quantize import RTNJob, rtn
from eqat_mm.data.image_text import preparing
from eqat_mm.quant.spec import QuantSpec
from tests.tiny_llava import save_tiny_llava


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny LLaVA, packed and not, and six records: one without its image, one with an image that was cut off."""
    folder = tmp_path_factory.mktemp("prepare")
    save_tiny_llava(folder / "llava", dtype=torch.float32)
    rtn(RTNJob(model=str(folder / "llava"), output=folder / "rtn", quant=QuantSpec(4, 32)))
    records = []
    for index in range(6):
        turns = [{"from": "human", "value": f"<image>\nw{index}"}, {"from": "gpt", "value": f"w{index + 20} w7"}]
        records.append({"image": f"{index}.jpg", "conversations": turns})
        if index:
            Image.effect_noise((64, 64), 50).save(folder / f"{index}.jpg")
    cut = folder / "5.jpg"
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    (folder / "records.json").write_text(json.dumps(records))
    return folder


def prepared(place: Path, *more: str) -> int:
    words = ["--model", str(place / "llava"), "--conversations.source", str(place / "records.json")]
    return run_command("prepare-data", [*words, *more])


def test_what_is_found_is_counted_by_kind_and_listed(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert prepared(place, "--conversations.check", "decode") == 0
    said = capsys.readouterr().out
    index = Path(said.rpartition("index: ")[2].strip())
    assert index.parent == place / "records.json.prepared"
    assert "6 records about 4 images, 0 without one" in said
    assert "    1 image missing:" in said
    assert "    1 image unreadable:" in said
    listed = index.with_name("problems.jsonl")
    assert f"all are listed in {listed}" in said
    assert [json.loads(line)["kind"] for line in listed.read_text().splitlines()] == [
        "image missing",
        "image unreadable",
    ]


def test_training_uses_what_was_prepared(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert prepared(place, "--conversations.check", "decode") == 0
    monkeypatch.setattr(preparing.Preparation, "_made", lambda self: pytest.fail("looked through again"))
    words = ["--model", str(place / "rtn"), "--quantized", str(place / "rtn" / "model"), "--recipe_for"]
    words += [json.dumps([str(place / "rtn")])]
    words += ["--conversations.source", str(place / "records.json"), "--conversations.on_bad_sample", "skip"]
    words += ["--output", str(place / "run"), "--max_steps", "1", "--batch_size", "2", "--accumulation", "1"]
    assert run_command("e2e-qp", [*words, "--device", "cpu", "--precision", "float32"]) == 0
    lines = (place / "run.problems.jsonl").read_text().splitlines()
    assert [json.loads(line)["where"].rpartition(" ")[2] for line in lines] == ["0", "5"]


def test_bad_settings_come_before_the_pass(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert prepared(place, "--conversations.too_long", "cut") == 2
    assert prepared(place, "--conversations.image_folder", str(place / "nowhere")) == 2
    assert prepared(place, "--conversations.source", str(place / "nothing.json")) == 2
    said = capsys.readouterr()
    assert "Traceback" not in said.err
    assert "check samples" not in said.err
