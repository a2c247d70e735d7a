"""A reader is asked about many folders in one process, and what it does not survive costs one folder."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.readers import cases, survey
from tests.readers.cases import Reader

PROGRAM = """
import os, sys, jobs, torch
from safetensors.torch import save_file
def answer(word, *, folder, inputs, outputs):
    if folder.endswith("dies"):
        print("KilledError: by the kernel", file=sys.stderr, flush=True)
        os._exit(3)
    if folder.endswith("bad"):
        raise ValueError("no kernel")
    save_file({"process": torch.tensor([os.getpid()])}, outputs)
jobs.do(answer)
"""


def test_one_process_for_what_it_survives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "reader.py").write_text(PROGRAM)
    (tmp_path / "jobs.py").symlink_to(survey.HERE / "jobs.py")
    monkeypatch.setattr(
        survey, "command", lambda _, __, *words: ([sys.executable, str(tmp_path / "reader.py"), *words], None)
    )
    monkeypatch.setattr(cases, "asked", lambda _: {"input_ids": torch.zeros(1, 2)})
    reader = Reader("none", "reader.py", words=("word",))
    folders = {("m", spec, "r"): tmp_path / spec for spec in ("one", "bad", "two", "dies", "three")}
    found: dict[str, Any] = {case[1]: answer for case, answer in survey._answers(reader, folders, tmp_path)}
    assert list(found) == ["one", "bad", "two", "dies", "three"]
    assert found["bad"] == "ValueError: no kernel"
    assert found["dies"] == "KilledError: by the kernel"
    assert torch.equal(found["one"]["process"], found["two"]["process"])
    assert not torch.equal(found["one"]["process"], found["three"]["process"])
