"""`eqat eval` in several processes: text and questions are divided among them, and the result is that of one."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from eqat_demo.easy_vqa_task import FILE_VARIABLE
from eqat_mm.commands.plumbing.lmms import tasks_folders
from eqat_mm.commands.verbs.quantize import rtn
from eqat_mm.runtime.files import read_json
from tests.commands.jobs import rtn_job
from tests.commands.launching import ALONE, DATA_PARALLEL, run, run_well, words_of
from tests.eval.questions import write_questions
from tests.tiny_llava import save_tiny_llava
from tests.tiny_model import Tiny

pytestmark = pytest.mark.slow


def test_text_is_divided(tiny: Tiny, tmp_path: Path) -> None:
    packed = rtn(rtn_job(tiny, tmp_path / "rtn"))
    settings = {"model": packed, "reference": tiny.folder, "data.source": tiny.text, "data.length": 16, "device": "cpu"}
    found = []
    for launcher, name in ((ALONE, "one"), (DATA_PARALLEL, "two")):
        output = tmp_path / f"{name}.json"
        said = run_well(words_of(launcher, "eval", settings | {"data.count": 7, "batch_size": 1, "output": output}))
        assert said.count("perplexity") == 1
        found.append({key: value for key, value in read_json(output).items() if key != "seconds"})
    assert found[0] == found[1]
    done = run(words_of(DATA_PARALLEL, "eval", settings | {"data.count": 1}))
    assert "1 windows for 2 processes" in done.stderr


@pytest.fixture
def llava(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny LLaVA, and questions for it in place of those of easy_vqa."""
    save_tiny_llava(tmp_path / "llava", dtype=torch.float32)
    write_questions(tmp_path / "questions.parquet")
    monkeypatch.setenv(FILE_VARIABLE, str(tmp_path / "questions.parquet"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "llava"


@pytest.mark.skipif(importlib.util.find_spec("lmms_eval") is None, reason="needs lmms-eval")
def test_questions_are_divided(llava: Path, tmp_path: Path) -> None:
    settings = {"model": llava, "tasks": "easy_vqa", "limit": 5, "device": "cpu"}
    found, answers = [], []
    for launcher, name in ((ALONE, "one"), (DATA_PARALLEL, "two")):
        run_well(words_of(launcher, "eval", settings | {"output": tmp_path / f"{name}.json"}))
        found.append(read_json(tmp_path / f"{name}.json")["tasks"])
        answers.append((tmp_path / f"{name}.answers.jsonl").read_bytes())
    assert found[0] == found[1]
    assert answers[0] == answers[1]


@pytest.mark.skipif(importlib.util.find_spec("lmms_eval") is None, reason="needs lmms-eval")
def test_questions_are_divided_by_the_command_of_lmms_eval(llava: Path, tmp_path: Path) -> None:
    flags = {"model": "eqat", "model_args": f"pretrained={llava}", "tasks": "easy_vqa", "limit": 5}
    flags |= {"include_path": tasks_folders()[0], "output_path": tmp_path / "out"}
    words = [word for key, value in flags.items() for word in (f"--{key}", str(value))]
    run_well([*DATA_PARALLEL, "-m", "lmms_eval", *words, "--log_samples"])
    (samples,) = tmp_path.glob("out/*/*samples*.jsonl")
    assert len(samples.read_text(encoding="utf-8").splitlines()) == 5
