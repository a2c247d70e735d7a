"""`eqat check-run` over a run of this project, as it is and with a number that cannot be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from eqat_mm.cli import main
from eqat_mm.commands.verbs.quantize import block_ap
from eqat_mm.quant.spec import QuantSpec
from tests.commands.jobs import block_ap_job
from tests.tiny_model import Tiny


@pytest.fixture(scope="module")
def run(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("made") / "block-ap"
    return block_ap(block_ap_job(tiny, output, quant=QuantSpec(8, 32))).parent


def test_a_run_that_goes_as_it_should(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check-run", str(run)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "ok   block-ap: losses: 2 blocks, all finite" in lines
    assert lines[-1] == f"{run}: {sum(line.startswith('ok') for line in lines)} checks passed"


def test_a_run_with_a_loss_that_is_none(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = run / "metrics.jsonl"
    first, *others = metrics.read_text().splitlines()
    metrics.write_text("\n".join([json.dumps(json.loads(first) | {"loss_after": float("nan")}), *others]) + "\n")
    assert main(["check-run", str(run), "--json"]) == 2
    said = capsys.readouterr()
    assert json.loads(said.out)["passed"] is False
    assert "1 of" in said.err
    assert "losses: block 0" in said.err
