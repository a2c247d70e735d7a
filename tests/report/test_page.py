"""The page: sound, whole without a network, and safe whatever is in the files."""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from eqat_mm.commands.plumbing.runs import model_fingerprint
from eqat_mm.report import Answers, Found, find, write_report
from eqat_mm.report.page import flat
from eqat_mm.runtime.sealed import read_sealed, write_sealed
from tests.report.html import checked
from tests.tiny_model import Tiny

SECTIONS = ["ladder", "blocks", "curves", "grids", "storage", "plan", "answers", "provenance"]
HOSTILE = "</style></title>\"'><script>alert(1)</script><img src=http://x.y onerror=alert(1)>{{ 7*7 }}$x^2$\u202e"
ATTACKING = "<img src=x onerror=alert(1)>&amp;"
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def page_of(found: Found, path: Path, answers: list[Answers] | None = None) -> str:
    write_report(found, path / "report.html", answers)
    return (path / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def written(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    page_of(find(root, model_fingerprint), folder)
    return folder / "report.html"


def test_a_page_is_sound_and_has_all_sections(written: Path) -> None:
    text = written.read_text(encoding="utf-8")
    page = checked(text)
    assert [name for name in page.ids if name in SECTIONS] == SECTIONS
    assert len(text) < 300_000


def test_a_page_says_what_was_measured(written: Path, found: Found) -> None:
    words = " ".join(checked(written.read_text(encoding="utf-8")).words.split())
    (measured,) = found.of(found.stages[1])
    assert f"{measured.numbers['perplexity']:,.2f}" in words
    assert f"{measured.numbers['kl']:.3f}" in words
    assert "Block-AP + E2E-QP" in words
    for stage in found.stages:
        assert str(stage.fingerprint) in words
        assert str(stage.record["versions"]["torch"]) in words
    assert "model.layers" not in words
    assert "mlp.down_proj" in words


def test_what_is_missing_is_said_with_the_command_that_makes_it(written: Path, root: Path) -> None:
    words = " ".join(checked(written.read_text(encoding="utf-8")).words.split())
    assert f"eqat eval --model {root / 'e2e-qp' / 'model'}" in words
    assert f"eqat report {root} --samples 4" in words
    assert words.count("Not recorded:") == 3  # two evaluations, and answers


def test_a_run_of_its_own_says_which_parts_it_lacks(root: Path, tiny: Tiny, tmp_path: Path) -> None:
    page = checked(page_of(find(root / "rtn", model_fingerprint), tmp_path))
    words = " ".join(page.words.split())
    assert "no run of Block-AP is in this folder" in words
    assert f"eqat block-ap --model {tiny.folder} --calibration.source" in words
    assert "no run of E2E-QP or LLM-QAT is in this folder" in words


def test_a_run_without_a_checkpoint_has_a_page(root: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(root / "block-ap", tmp_path / "block-ap")
    shutil.rmtree(copy / "model")
    words = checked(page_of(find(copy, model_fingerprint), tmp_path)).words
    assert "is not finished" in words
    assert "no packed checkpoint is in this folder yet" in words


def test_a_run_of_an_older_version_has_a_page(root: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(root / "block-ap", tmp_path / "block-ap")
    (copy / "metrics.jsonl").unlink()
    record = read_sealed(copy / "run.json")
    write_sealed(copy / "run.json", {name: record[name] for name in ("command", "config", "finished")})
    words = " ".join(checked(page_of(find(copy, model_fingerprint), tmp_path)).words.split())
    assert "its metrics.jsonl is not there, or empty" in words
    assert "the plan of block-ap" in words


def spoiled(value: Any) -> Any:
    """The value with every text in it made hostile, names too."""
    if isinstance(value, dict):
        return {f"{name}{HOSTILE}": spoiled(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [spoiled(inner) for inner in value]
    return HOSTILE if isinstance(value, str) else value


@pytest.fixture
def hostile(root: Path, tmp_path: Path) -> Path:
    """A folder of runs whose files hold hostile text wherever there is text."""
    copy = shutil.copytree(root, tmp_path / "runs")
    for name in ("block-ap", "e2e-qp"):
        folder = (copy / name).rename(copy / f"{name}{ATTACKING}")
        record = read_sealed(folder / "run.json")
        kept = {"command": name, "started": record["started"], "finished": HOSTILE, "seed": HOSTILE, "python": HOSTILE}
        kept |= {part: spoiled(record[part]) for part in ("config", "environment", "versions", "decides", "plan")}
        write_sealed(
            folder / "run.json", kept | {"continued": [{"started": HOSTILE, "environment": {HOSTILE: HOSTILE}}]}
        )
        manifest = read_sealed(folder / "model" / "eqat.json")
        manifest["provenance"] = [one | {"command": HOSTILE} for one in manifest["provenance"]]
        write_sealed(folder / "model" / "eqat.json", manifest | {"source": HOSTILE})
        for shard in (folder / "model").glob("*.safetensors"):
            tensors = load_file(shard)
            save_file({name.replace("mlp.", f"mlp{ATTACKING}."): value for name, value in tensors.items()}, shard)
        with (folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": HOSTILE, "block": [], "loss": {}, HOSTILE: HOSTILE}) + "\n" + HOSTILE)
    numbers = json.loads((copy / "eval" / "block-ap.json").read_text(encoding="utf-8"))
    numbers |= {"tasks": {HOSTILE: {"accuracy": 0.5}}, "text": ATTACKING, "perplexity": HOSTILE}
    (copy / "eval" / f"{ATTACKING}.json").write_text(json.dumps(numbers), encoding="utf-8")
    (copy / "rtn" / "run.json").write_text(HOSTILE, encoding="utf-8")
    return copy


def test_nothing_in_the_files_becomes_part_of_the_page(hostile: Path, tmp_path: Path) -> None:
    found = find(hostile, model_fingerprint)
    index = json.loads((found.stages[0].model / "model.safetensors.index.json").read_text(encoding="utf-8"))
    assert index["weight_map"]
    answers = [Answers(HOSTILE, (), ((HOSTILE, HOSTILE),))]
    page = checked(page_of(found, tmp_path, answers))
    assert not page.tags & {"script", "img"}
    assert page.words.count(HOSTILE) > 20
    assert ATTACKING in page.words
    assert "49" not in page.words.split(HOSTILE)[0][-4:]


def test_answers_and_their_images_are_shown(found: Found, tmp_path: Path) -> None:
    picture = "data:image/jpeg;base64,AAAA"
    answers = [Answers("What is it?", (picture,), (("full precision", "A <b>cat</b>."), ("rtn", "w w w")))]
    page = checked(page_of(found, tmp_path, answers))
    assert picture in page.addresses
    assert "A <b>cat</b>." in page.words


def test_evaluations_of_different_texts_are_told_apart(found: Found, tmp_path: Path) -> None:
    first, *others = found.measured
    changed = replace(found, measured=[first, *(replace(one, text="f" * 32) for one in others)])
    assert "measured on different texts" in page_of(changed, tmp_path)
    assert "measured on different texts" not in page_of(found, tmp_path)


def test_a_ladder_of_tasks_has_no_empty_columns(found: Found, tmp_path: Path) -> None:
    judged = [replace(one, numbers={"tasks": {"easy_vqa": {"accuracy": 0.5}}}) for one in found.measured]
    page = page_of(replace(found, measured=judged), tmp_path)
    assert "easy_vqa" in page
    assert "same top-1" not in page
    assert "same top-1" in page_of(found, tmp_path)


def test_settings_are_flattened() -> None:
    assert flat({"a": {"b": 1, "c": None}, "d": [1, 2]}) == [("a.b", "1"), ("a.c", "none"), ("d", "[1, 2]")]


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["dark", "light"])
@pytest.mark.parametrize("width", [1200, 500])
def test_a_browser_shows_the_page(written: Path, tmp_path: Path, scheme: str, width: int) -> None:
    checked(written.read_text(encoding="utf-8"))  # all that can be said where there is no browser
    if BROWSER is None:
        return
    shot = tmp_path / "shot.png"
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --hide-scrollbars --disable-sync"
    flags += " --disable-background-networking --disable-component-update --enable-logging=stderr"
    told = [
        f"--blink-settings=preferredColorScheme={['dark', 'light'].index(scheme)}",
        f"--user-data-dir={tmp_path}/me",
    ]
    told += [f"--window-size={width},2400", f"--screenshot={shot}", written.as_uri()]
    done = subprocess.run([BROWSER, *flags.split(), *told], capture_output=True, text=True, timeout=120, check=True)
    assert "CONSOLE" not in done.stderr
    pixels = np.asarray(Image.open(shot).convert("RGB"))
    assert pixels.shape == (2400, width, 3)
    background, colours = np.median(pixels, axis=(0, 1)), np.unique(pixels.reshape(-1, 3), axis=0)
    assert (background < 60).all() if scheme == "dark" else (background > 200).all()
    assert len(colours) > 100
    left = np.abs(pixels.astype(int) - background).sum(axis=2) > 60
    assert left.mean() > 0.01, "nearly empty"
    assert left[-800:].any(), "the page ends early"
