"""The jobs that quantize: their folders, and what starting one again does. One run is really killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from eqat_mm.checkpoint.manifest import MANIFEST, read_manifest
from eqat_mm.checkpoint.verify import verify_checkpoint
from eqat_mm.cli import main
from eqat_mm.commands.verbs import quantize
from eqat_mm.commands.verbs.quantize import block_ap, rtn
from eqat_mm.errors import ConfigError
from eqat_mm.runtime.files import read_json, sha256_of
from eqat_mm.runtime.sealed import read_sealed
from tests.checkpoint.files import assert_four_lines, contents, same_weights
from tests.commands.jobs import SPEC, block_ap_job, rtn_job
from tests.tiny_model import Tiny, save_tiny

KILLED_BLOCKS = 4
DEADLINE = 120.0


@pytest.fixture
def finished(tiny: Tiny, tmp_path: Path) -> Path:
    """Folder of a finished Block-AP run."""
    block_ap(block_ap_job(tiny, tmp_path / "run"))
    return tmp_path / "run"


def never(*_: Any, **__: Any) -> None:
    raise AssertionError("a finished run was started again")


# ---- what is written ------------------------------------------------------------------------------


def test_block_ap_writes_checkpoint_metrics_and_record(tiny: Tiny, finished: Path) -> None:
    assert {path.name for path in finished.iterdir()} == {"model", "metrics.jsonl", "run.json", "state.json"}
    manifest = verify_checkpoint(finished / "model")
    assert manifest.stage == "block-ap"
    assert manifest.source == str(tiny.folder)
    record = read_sealed(finished / "run.json")
    assert record.pop("finished") >= record["started"]
    assert record.pop("seconds") > 0
    assert record.pop("proof") == sha256_of(finished / "model" / MANIFEST)
    assert record.pop("peak_ram") > 2**20
    assert record.pop("plan").keys() == {"gpu", "ram", "disk", "written", "seconds"}
    assert manifest.provenance == [record]
    assert manifest.provenance[0]["config"]["fit"]["lr_weight"] == 2e-3


def test_rtn_needs_no_text(tiny: Tiny, tmp_path: Path) -> None:
    folder = rtn(rtn_job(tiny, tmp_path / "run"))
    assert folder == tmp_path / "run" / "model"
    assert verify_checkpoint(folder).stage == "round-to-nearest"
    assert (folder / "tokenizer.json").is_file()


def test_without_an_output_the_folder_is_named_after_model_and_spec(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert rtn(rtn_job(tiny, None)) == Path("runs/tiny-llama-w2g32/rtn/model")


# ---- starting again -------------------------------------------------------------------------------


def test_a_finished_run_is_not_repeated(
    tiny: Tiny, finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(finished)
    monkeypatch.setattr(quantize, "run_block_ap", never)
    assert block_ap(block_ap_job(tiny, finished)) == finished / "model"
    assert "already finished" in capsys.readouterr().out
    assert contents(finished) == before


def test_a_finished_run_is_kept_from_other_settings(tiny: Tiny, finished: Path) -> None:
    before = contents(finished)
    with pytest.raises(ConfigError) as raised:
        block_ap(block_ap_job(tiny, finished, seed=1))
    assert_four_lines(raised.value)
    assert "seed" in str(raised.value)
    assert "--overwrite" in raised.value.do
    assert contents(finished) == before


def test_other_text_is_another_run(tiny: Tiny, finished: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(tiny.text.read_text(encoding="utf-8"), encoding="utf-8")
    job = block_ap_job(tiny, tmp_path / "other", calibration=replace(tiny.windows(12), source=str(text)))
    block_ap(job)
    text.write_text(tiny.text.read_text(encoding="utf-8").replace("w5", "w6"), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"inputs\.data"):
        block_ap(job)


def test_overwrite_starts_again(tiny: Tiny, finished: Path) -> None:
    (finished / "notes.txt").touch()
    block_ap(block_ap_job(tiny, finished, seed=1, overwrite=True))
    names = {"model", "metrics.jsonl", "run.json", "state.json", "notes.txt"}
    assert {path.name for path in finished.iterdir()} == names
    assert read_manifest(finished / "model").provenance[0]["config"]["seed"] == 1


def test_an_unfinished_run_is_kept_from_other_settings(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("eqat_mm.checkpoint.write.CheckpointWriter.finish", stop)
        with pytest.raises(KeyboardInterrupt):
            block_ap(block_ap_job(tiny, tmp_path))
    before = contents(tmp_path)
    with pytest.raises(ConfigError) as raised:
        block_ap(block_ap_job(tiny, tmp_path, seed=1))
    assert_four_lines(raised.value)
    assert "seed=1" in raised.value.given
    assert "seed=0" in raised.value.allowed
    assert contents(tmp_path) == before
    block_ap(block_ap_job(tiny, tmp_path, seed=1, overwrite=True))
    assert read_manifest(tmp_path / "model").provenance[0]["config"]["seed"] == 1


def stop(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


def test_an_interrupted_command_says_how_to_go_on(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("eqat_mm.checkpoint.write.CheckpointWriter.finish", stop)
    arguments = ["--model", str(tiny.folder), "--output", str(tmp_path), "--quant.group_size", "32"]
    assert main(["rtn", *arguments]) == 130
    assert "the same command" in capsys.readouterr().err


# ---- killed ---------------------------------------------------------------------------------------


def command(tiny: Tiny, output: Path) -> list[str]:
    """`eqat block-ap` with enough steps that a kill comes in the middle of a block."""
    fit = {"epochs": 4, "batch_size": 1, "lr_weight": 2e-3, "validation_samples": 3}
    text = {"source": str(tiny.text), "length": 16, "count": 12}
    options: dict[str, Any] = {
        "model": str(tiny.folder),
        "output": str(output),
        "quant": SPEC.as_dict(),
        "start": {"init": "gptq"},
        "fit": fit,
        "calibration": text,
        "precision": "float32",
        "device": "cpu",
        "recipe_for": [str(tiny.folder)],
    }
    pairs = [(f"--{name}", value if isinstance(value, str) else json.dumps(value)) for name, value in options.items()]
    return ["block-ap", *(word for pair in pairs for word in pair)]


def committed(output: Path) -> int:
    state = output / "state.json"
    return len(read_json(state)["records"]) if state.is_file() else 0


def kill_after_first_block(arguments: list[str], output: Path) -> None:
    """Run a command in a process of its own and kill it while its second block is trained."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "eqat_mm.cli", *arguments],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + DEADLINE
    while committed(output) < 1 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    time.sleep(0.05)  # into the block, past the commit of the one before
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


def test_a_killed_run_gives_the_weights_of_one_that_was_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny = save_tiny(tmp_path, blocks=KILLED_BLOCKS)
    killed, undisturbed = tmp_path / "killed", tmp_path / "undisturbed"
    kill_after_first_block(command(tiny, killed), killed)
    assert 1 <= committed(killed) < KILLED_BLOCKS
    assert not (killed / "model" / MANIFEST).exists()
    torch.manual_seed(99)
    assert main(command(tiny, killed)) == 0
    assert "block 1/" not in capsys.readouterr().out
    assert main(command(tiny, undisturbed)) == 0
    assert same_weights(killed / "model", undisturbed / "model")
    lines = (killed / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["block"] for line in lines] == list(range(KILLED_BLOCKS))


def test_streams_on_disk_give_the_same_weights(tiny: Tiny, finished: Path, tmp_path: Path) -> None:
    block_ap(block_ap_job(tiny, tmp_path / "disk", spool="disk"))
    assert same_weights(tmp_path / "disk" / "model", finished / "model")
