"""The notebook, from its first cell to its last, on a tiny model."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from eqat_mm.checkpoint.verify import verify_checkpoint
from tests.report.html import checked
from tests.tiny_model import save_tiny

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / "notebooks" / "first_steps.ipynb"


def test_a_notebook_is_kept_without_what_it_printed() -> None:
    for cell in nbformat.read(NOTEBOOK, as_version=4).cells:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning:jupyter_client", "ignore::DeprecationWarning:zmq")
def test_a_notebook_runs_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = save_tiny(tmp_path, blocks=2)
    command = tmp_path / "bin" / "eqat"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m eqat_mm "$@"\n', encoding="utf-8")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{command.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(str(ROOT / name) for name in ("", "kernels", "eval")))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    (parameters,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ()))
    given = {
        "MODEL": str(tiny.folder),
        "TEXT": str(tiny.text),
        "LENGTH": 16,
        "WINDOWS": 12,
        "STEPS": 4,
        "JUDGED": 8,
        "GROUP": 32,
    }
    parameters.source += "".join(f"\n{name} = {value!r}" for name, value in given.items())
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    runs = tmp_path / "runs" / "first-steps"
    kl = {name: json.loads((runs / "eval" / f"{name}.json").read_text())["kl"] for name in ("full", "rtn", "e2e-qp")}
    assert kl["full"] < 1e-5 < min(kl["rtn"], kl["e2e-qp"])
    assert kl["rtn"] != kl["e2e-qp"]
    assert verify_checkpoint(runs / "e2e-qp" / "model").stage == "e2e-qp"
    page = checked((runs / "report.html").read_text(encoding="utf-8"))
    assert "Block-AP + E2E-QP" in page.words
    assert "KL to full precision" in page.words
