"""`eqat plan`, and the same before a run begins."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from eqat_mm.cli import main
from eqat_mm.commands.plumbing import preflight
from eqat_mm.commands.plumbing.shapes import model_shape
from eqat_mm.commands.verbs.plan import PlanJob, plan
from eqat_mm.commands.verbs.quantize import block_ap, rtn
from eqat_mm.commands.verbs.tune import E2EQPJob, e2e_qp
from eqat_mm.data.text.settings import TextWindows
from eqat_mm.errors import AdapterError, CheckpointError, ConfigError, ResourceError
from eqat_mm.plan.machine import Machine, this_machine
from eqat_mm.quant.spec import QuantSpec
from eqat_mm.train.e2e_qp import E2EQPConfig
from tests.checkpoint.files import assert_four_lines
from tests.commands.jobs import block_ap_job, rtn_job
from tests.tiny_model import Tiny


def planned(capsys: pytest.CaptureFixture[str], *argv: str) -> dict[str, Any]:
    """What `eqat plan --json` prints."""
    assert main(["plan", *argv, "--json"]) == 0
    printed: dict[str, Any] = json.loads(capsys.readouterr().out)
    return printed


def test_a_table_with_the_formula_of_every_number(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "llama-2-7b", "--gpu", "h100", "--spool", "ram"]) == 0
    said = capsys.readouterr().out
    phases = ("Block-AP", "E2E-QP, text", "LLM-QAT", "evaluation", "checkpoint")
    assert all(f"\n{phase}\n" in said for phase in phases)
    assert "20 B x 208.7 M" in said
    assert "streams: 2 x 68.72 GB" in said
    assert "short of GPU memory: 122" in said
    assert "--deepspeed zero-3 on 2 GPUs" in said


def test_json_has_every_term(capsys: pytest.CaptureFixture[str]) -> None:
    printed = planned(capsys, "llava-1.5-13b", "--gpu", "4090", "--gpus", "8", "--ram", "256", "--disk", "2000")
    names = [phase["name"] for phase in printed["phases"]]
    assert names == ["Block-AP", "E2E-QP, text", "E2E-QP, images and text", "LLM-QAT", "evaluation", "checkpoint"]
    for phase in printed["phases"]:
        for amount in (phase[what] for what in ("gpu", "ram", "disk", "written", "seconds")):
            assert amount["total"] == sum(term["value"] for term in amount["terms"])
    assert printed["machine"]["gpus"] == 8
    assert printed["machine"]["ram"] == 256e9


def test_the_recipe_counts_and_flags_win(capsys: pytest.CaptureFixture[str]) -> None:
    tokens = 4096 * 2048
    by_recipe = planned(capsys, "llama-2-7b", "--gpu", "h100")["phases"][0]
    by_flags = planned(capsys, "llama-2-7b", "--gpu", "h100", "--calibration.length", "256")["phases"][0]
    assert term(by_recipe, "ram", "streams") == 2 * 2 * 4096 * tokens
    assert term(by_flags, "ram", "streams") == 2 * 2 * 4096 * tokens / 8


@pytest.mark.parametrize(
    ("ram", "disk", "spool"), [(512, 2000, "ram"), (150, 2000, "disk"), (64, 2000, "disk"), (64, 100, "ram")]
)
def test_streams_are_where_they_fit(capsys: pytest.CaptureFixture[str], ram: int, disk: int, spool: str) -> None:
    machine = ["--gpu", "h100", "--ram", str(ram), "--disk", str(disk)]
    phase = planned(capsys, "llama-2-7b", *machine)["phases"][0]
    assert phase == planned(capsys, "llama-2-7b", *machine, "--spool", spool)["phases"][0]
    assert phase["fits"] == ((ram, disk) != (64, 100))


def term(phase: dict[str, Any], amount: str, what: str) -> float:
    """A number of a plan."""
    return sum(float(part["value"]) for part in phase[amount]["terms"] if part["what"] == what)


def test_the_recipe_of_e2e_qp_counts_where_no_settings_are_given() -> None:
    tuned = plan(PlanJob(model="llava-1.5-7b", gpu="h100"))[2].phase
    given = plan(PlanJob(model="llava-1.5-7b", gpu="h100", e2e_qp=E2EQPConfig()))[2].phase
    assert any(term.what == "projector" for term in tuned.gpu.terms)
    assert not any(term.what == "projector" for term in given.gpu.terms)


def test_bits_change_the_checkpoint() -> None:
    two, four = (
        plan(PlanJob(model="llama-2-7b", gpu="h100", quant=QuantSpec(bits=bits)))[-1].phase.disk.total
        for bits in (2, 4)
    )
    assert four - two == pytest.approx(6_476_005_376 * 2 / 8 * (1 + 1 / 64))


def test_a_folder_and_a_config_are_models(tiny: Tiny, tmp_path: Path) -> None:
    alone = shutil.copy(tiny.folder / "config.json", tmp_path / "config.json")
    assert model_shape(str(tiny.folder)) == model_shape(str(alone))
    with pytest.raises(CheckpointError):
        model_shape(str(tiny.text.parent))
    with pytest.raises(AdapterError):
        model_shape("no-such-model")


@pytest.mark.parametrize(
    "entry",
    [
        {"quant_method": "gptq", "bits": 4},
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        {"quant_method": "compressed-tensors", "quantization_status": "compressed"},
        {"bits": 4},
        "fp8",
    ],
    ids=str,
)
@pytest.mark.parametrize("part", [None, "text_config"])
def test_a_model_that_is_quantized_already_is_refused(tiny: Tiny, tmp_path: Path, entry: Any, part: str | None) -> None:
    config = json.loads((tiny.folder / "config.json").read_text())
    named = {"quantization_config": entry}
    (tmp_path / "config.json").write_text(json.dumps(config | (named if part is None else {part: named})))
    for model in (tmp_path, tmp_path / "config.json"):
        with pytest.raises(CheckpointError, match="quantized already") as raised:
            plan(PlanJob(model=str(model), gpu="4090"))
        assert_four_lines(raised.value)


def test_a_model_that_was_decompressed_is_planned(tiny: Tiny, tmp_path: Path) -> None:
    config = json.loads((tiny.folder / "config.json").read_text())
    entry = {"quant_method": "compressed-tensors", "quantization_status": "decompressed"}
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": entry}))
    assert plan(PlanJob(model=str(tmp_path), gpu="4090"))


def test_a_packed_checkpoint_is_refused_and_a_shipped_model_in_its_folder_is_not(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = rtn(rtn_job(tiny, tmp_path / "run"))
    for model in (packed, tmp_path / "run", packed / "config.json"):
        with pytest.raises(ConfigError, match="the model it was made from"):
            plan(PlanJob(model=str(model), gpu="4090"))
    monkeypatch.chdir(packed)
    assert plan(PlanJob(model="llama-2-7b", gpu="4090"))


def test_an_existing_folder_wins_over_a_shipped_name(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(tiny.folder, tmp_path / "llama-2-7b")
    monkeypatch.chdir(tmp_path)
    assert model_shape("llama-2-7b").hidden == 64


def test_seventy_billion_in_two_seconds() -> None:
    model_shape("llama-2-7b")  # what transformers imports at the first model is not the plan's
    start = time.process_time()
    plan(PlanJob(model="llama-2-70b", gpu="h100"))
    assert time.process_time() - start < 2


# ---- before a run ---------------------------------------------------------------------------------


def test_block_ap_says_first_what_it_needs(tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    block_ap(block_ap_job(tiny, tmp_path / "run"))
    first = capsys.readouterr().out.splitlines()[0]
    assert first.startswith("plan of Block-AP: RAM ")
    assert first.endswith("s on cpu")


def test_e2e_qp_says_what_it_needs_before_it_asks_for_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    roomy(monkeypatch)
    with pytest.raises(CheckpointError):
        e2e_qp(E2EQPJob(model="llava-1.5-13b", text_only=True, data=TextWindows("t", length=4096, count=4096)))
    assert "plan of E2E-QP, text: RAM " in capsys.readouterr().out


def test_what_cannot_be_is_refused(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit(monkeypatch, ram=0.5)
    with pytest.raises(ResourceError) as raised:
        block_ap(block_ap_job(tiny, tmp_path / "run"))
    assert_four_lines(raised.value)
    assert "RAM" in raised.value.given
    assert not (tmp_path / "run").exists()


def test_what_may_just_fit_is_warned_of(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    limit(monkeypatch, ram=0.95)
    block_ap(block_ap_job(tiny, tmp_path / "run"))
    assert "it may be too much: RAM" in capsys.readouterr().out


def limit(monkeypatch: pytest.MonkeyPatch, ram: float) -> None:
    """Let the machine have this share of the RAM that a process needs."""

    def machine(*arguments: Any) -> Machine:
        found = this_machine(*arguments)
        return replace(found, ram=ram * found.process)

    monkeypatch.setattr(preflight, "this_machine", machine)


def roomy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the machine have as much as one likes."""
    monkeypatch.setattr(preflight, "this_machine", lambda *a: replace(this_machine(*a), ram=1e15, disk=1e15))
