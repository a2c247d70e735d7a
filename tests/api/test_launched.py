"""A script with one call, started by a launcher, returns the model in each of its processes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.api.conftest import FEW, STEPS, WINDOWS
from tests.commands.launching import DATA_PARALLEL, run_well
from tests.tiny_model import Tiny

SCRIPT = """
import json, sys
import eqat_mm
model, given = sys.argv[2], json.loads(sys.argv[3])
found = getattr(eqat_mm, sys.argv[1])(model, **given)
print(f"made {found.checkpoint_origin.folder}\\n", end="")
"""


@pytest.mark.slow
def test_both_phases_in_two_processes(tiny: Tiny, tmp_path: Path) -> None:
    script, run = tmp_path / "one_call.py", tmp_path / "block-ap"
    script.write_text(SCRIPT, encoding="utf-8")
    common = {"text": str(tiny.text), "device": "cpu"}
    fit = {**common, "bits": 2, "group_size": 32, "output": str(run), "settings": {**FEW, "fit.lanes": 2}}
    said = run_well([*DATA_PARALLEL, str(script), "quantize", str(tiny.folder), json.dumps(fit)])
    assert said.count(f"made {run / 'model'}") == 2
    tuned = {**common, "settings": {**STEPS, **WINDOWS}}
    for _ in range(2):  # made, then found
        said = run_well([*DATA_PARALLEL, str(script), "tune", str(run), json.dumps(tuned)])
        assert said.count(f"made {tmp_path / 'e2e-qp' / 'model'}") == 2
