"""E2E-QP on image-text data with an image that breaks when its turn comes: an end that can be mended, or a stand-in."""

from __future__ import annotations

import json
from dataclasses import replace
from multiprocessing import active_children
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from eqat_mm.commands.verbs.quantize import RTNJob, rtn
from eqat_mm.commands.verbs.tune import E2EQPJob, e2e_qp
from eqat_mm.data.image_text.settings import ImageTextData
from eqat_mm.errors import ConfigError, DataError
from eqat_mm.quant.spec import QuantSpec
from tests.checkpoint.files import same_weights
from tests.commands.launching import ALONE, DATA_PARALLEL, TRAINING, losses, run_well, words_of
from tests.tiny_llava import save_tiny_llava
from tests.tolerances import assert_close

SAMPLES = 12


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a packed tiny LLaVA and `records.json`, whose record 5 is about a JPEG file that was cut off."""
    folder = tmp_path_factory.mktemp("bad-samples")
    save_tiny_llava(folder / "llava", dtype=torch.float32)
    rtn(RTNJob(model=str(folder / "llava"), output=folder / "rtn", quant=QuantSpec(2, 32)))
    records = []
    for index in range(SAMPLES):
        Image.effect_noise((64, 64), 50 + index).save(folder / f"{index}.jpg")
        turns = [{"from": "human", "value": f"<image>\nw{index}"}, {"from": "gpt", "value": f"w{index + 20} w7"}]
        records.append({"image": f"{index}.jpg", "conversations": turns})
    cut = folder / "5.jpg"
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    (folder / "records.json").write_text(json.dumps(records))
    return folder


def job(place: Path, name: str, how: Any, **options: Any) -> E2EQPJob:
    data = ImageTextData(str(place / "records.json"), on_bad_sample=how)
    return E2EQPJob(
        model=str(place / "llava"),
        quantized=place / "rtn" / "model",
        output=place / name,
        conversations=data,
        device="cpu",
        recipe_for=(str(place / "llava"),),
        precision="float32",
        batch_size=2,
        accumulation=1,
        learning_rate=2e-3,
        **options,
    )


@pytest.fixture(scope="module")
def skipped(place: Path) -> Path:
    e2e_qp(job(place, "skipped", "skip", save_steps=0))
    return place / "skipped"


def last_step(run: Path) -> int:
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    return steps[-1]


def test_with_skip_the_run_has_all_its_steps(place: Path) -> None:
    e2e_qp(job(place, "skipped", "skip", save_steps=0))
    assert last_step(place / "skipped") == SAMPLES // 2
    lines = (place / "skipped.problems.jsonl").read_text().splitlines()
    assert [json.loads(line)["where"] for line in lines] == [f"{place / 'records.json'}, record 5"]


def test_with_error_it_ends_and_goes_on_with_skip(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(DataError, match=r"5\.jpg is unreadable") as caught:
        e2e_qp(job(place, "ended", "error", save_steps=1, logging_steps=1))
    assert "the same command again with --conversations.on_bad_sample skip" in caught.value.do
    assert not (place / "ended" / "model").exists()
    done = capsys.readouterr().out.count("  loss ")
    assert done > 0
    e2e_qp(job(place, "ended", "skip", save_steps=1, logging_steps=1))
    assert last_step(place / "ended") == SAMPLES // 2
    assert capsys.readouterr().out.count("  loss ") == SAMPLES // 2 - done


def test_the_run_goes_on_where_its_bad_record_was_removed(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = tmp_path / "whole.json"
    records = json.loads((place / "records.json").read_text())
    for record in records:
        record["image"] = str(Path(place.name) / record["image"])
    whole.write_text(json.dumps(records))
    images = {"source": str(whole), "image_folder": place.parent}
    asked = replace(job(place, "lost", "error", save_steps=1, logging_steps=1), output=tmp_path / "lost")
    with pytest.raises(DataError, match=r"5\.jpg is unreadable"):
        e2e_qp(replace(asked, conversations=ImageTextData(**images)))
    done = capsys.readouterr().out.count("  loss ")
    whole.write_text(json.dumps(records[:5] + records[6:]))
    for _ in range(2):  # to its end; then to say so
        e2e_qp(replace(asked, conversations=ImageTextData(**images)))
    said = capsys.readouterr().out
    assert "1 of its 12 samples are gone" in said
    assert "already finished" in said
    assert said.count("  loss ") == SAMPLES // 2 - done
    whole.write_text(json.dumps([records[0]] * 12))
    with pytest.raises(ConfigError, match="data"):
        e2e_qp(replace(asked, conversations=ImageTextData(**images)))


def test_other_settings_are_refused_before_the_data_are_read(place: Path, skipped: Path) -> None:
    changed = replace(job(place, "skipped", "skip", save_steps=0), learning_rate=1e-3)
    nowhere = replace(changed, conversations=ImageTextData(str(place / "gone.json"), on_bad_sample="skip"))
    with pytest.raises(ConfigError, match="learning_rate"):
        e2e_qp(nowhere)


def test_workers_read_beside_the_training_and_their_errors_end_it(place: Path, skipped: Path, tmp_path: Path) -> None:
    beside = replace(job(place, "workers", "skip", save_steps=0), output=tmp_path / "run", dataloader_num_workers=2)
    e2e_qp(beside)
    assert same_weights(tmp_path / "run" / "model", skipped / "model")
    with pytest.raises(DataError, match=r"5\.jpg is unreadable") as error:
        e2e_qp(
            replace(job(place, "workers", "error", save_steps=0), output=tmp_path / "error", dataloader_num_workers=1)
        )
    assert not active_children(), "of a training that has ended, with its error still at hand"
    assert error.value


@pytest.mark.slow
def test_two_processes_put_the_same_sample_in_its_place(place: Path) -> None:
    settings = TRAINING | {
        "model": place / "llava",
        "quantized": place / "rtn" / "model",
        "conversations.source": place / "records.json",
        "conversations.on_bad_sample": "skip",
        "learning_rate": 2e-3,
    }
    said = run_well(words_of(ALONE, "e2e-qp", settings | {"output": place / "alone", "batch_size": 2}))
    told = run_well(words_of(DATA_PARALLEL, "e2e-qp", settings | {"output": place / "two", "batch_size": 1}))
    assert_close(losses(place / "two"), losses(place / "alone"), "model")
    for words in (said, told):
        assert words.count("other samples stood in for 1 that could not be used: 1 image unreadable") == 1
