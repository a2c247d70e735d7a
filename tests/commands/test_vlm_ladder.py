"""The ladder of a vision-language model: which commands it gives, and what it does with what they leave.

The commands themselves are not run here: `make demo-vlm` is that, and each has tests of its own.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from eqat_mm.checkpoint.manifest import Manifest
from eqat_mm.cli import parse_job
from eqat_mm.commands.plumbing.answers import predictions_of
from eqat_mm.commands.tables import vlm_ladder as module
from eqat_mm.commands.tables.vlm_ladder import table, vlm_ladder
from eqat_mm.commands.tables.vlm_rungs import VLMLadderJob, rungs
from eqat_mm.errors import ConfigError, TrainingError
from eqat_mm.quant.spec import QuantSpec
from eqat_mm.runtime.files import read_json, write_json
from tests.checkpoint.files import assert_four_lines

STAGES = ["full precision", "round-to-nearest", "Block-AP", "Block-AP + LoRA", "Block-AP + E2E-QP"]


def manifest(digest: str) -> Manifest:
    """Of a checkpoint whose weights have a SHA-256 of one digit."""
    return Manifest("llava", QuantSpec().as_dict(), "any", "tiny", {"model.safetensors": digest * 64}, [{"config": {}}])


@pytest.fixture
def job(tmp_path: Path) -> VLMLadderJob:
    return VLMLadderJob(model=str(tmp_path / "model"), bits=(4, 2), lora=True, output=tmp_path / "runs", questions=20)


@pytest.fixture
def ran(job: VLMLadderJob, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """What would have been run; lmms-eval finds half of the answers right."""
    (Path(job.model)).mkdir()
    (Path(job.model) / "config.json").write_text("{}")
    (Path(job.model) / "model.safetensors").write_bytes(bytes(9))
    commands: list[list[str]] = []

    def run(words: list[str]) -> None:
        commands.append(words)
        if "--output" in words and "eval" not in words:
            folder = Path(words[words.index("--output") + 1]) / "model"
            if not folder.is_dir():
                manifest("0").write(folder)
        if "eval" in words:
            output = Path(words[words.index("--output") + 1])
            asked = int(words[words.index("--limit") + 1]) if "--limit" in words else 9673
            row: dict[str, Any] = {"accuracy": 0.5, "questions": asked, "by_type": {"shape": 1.0}, "nll": 0.25}
            if "--reference" in words:
                row |= {"kl": 0.125, "flips": 0.0625}
            write_json(output, {"tasks": {words[words.index("--tasks") + 1]: row}})
            predictions_of(output).touch()

    monkeypatch.setattr(module, "run_command", run)
    monkeypatch.setattr(module, "require_lmms_eval", lambda: None)
    monkeypatch.setattr(module, "blind_accuracy", lambda task: 0.678)
    monkeypatch.setattr(module, "bits_per_weight", lambda folder: None if folder == Path(job.model) else 2.28)
    return commands


def test_every_bit_width_has_its_rungs(job: VLMLadderJob) -> None:
    found = [(rung.bits, rung.stage) for rung in rungs(job, Path("full"))]
    assert found == [(16, STAGES[0]), *((bits, stage) for bits in (4, 2) for stage in STAGES[1:])]
    without = [rung.stage for rung in rungs(replace(job, lora=False, bits=(2,)), Path("full"))]
    assert without == [stage for stage in STAGES if stage != "Block-AP + LoRA"]


def test_the_commands_are_ones_that_eqat_takes(job: VLMLadderJob) -> None:
    by_stage = {rung.stage: rung for rung in rungs(replace(job, model="demo-llava", bits=(3,)), Path("full"))}
    fitted = by_stage["Block-AP"].folder
    for stage, name, trains in (
        ("Block-AP", "block-ap", None),
        ("Block-AP + LoRA", "e2e-qp", "lora"),
        ("Block-AP + E2E-QP", "e2e-qp", "scales"),
    ):
        words = by_stage[stage].command
        assert words is not None
        parsed: Any = parse_job(name, words[words.index(name) + 1 :])
        assert (parsed.model, parsed.quant.bits, parsed.quant.group_size) == ("demo-llava", 3, 64)
        assert parsed.recipe_for == ("demo-llava",)
        assert parsed.output == by_stage[stage].folder.parent
        if trains is not None:
            assert (parsed.trains, parsed.quantized) == (trains, fitted)


def test_block_ap_sees_what_e2e_qp_learns_from(job: VLMLadderJob) -> None:
    demo = replace(job, model="demo-llava", bits=(2,), images=True)
    for asked, source in ((demo, "demo-easy-vqa"), (replace(demo, conversations="mix.json"), "mix.json")):
        by_stage = {each.stage: each for each in rungs(asked, Path("full"))}
        rung, behind = by_stage["Block-AP on images"], by_stage["on images + E2E-QP"]
        assert rung.command is not None
        assert behind.command is not None
        tuned: Any = parse_job("e2e-qp", behind.command[behind.command.index("e2e-qp") + 1 :])
        assert (tuned.quantized, tuned.output) == (rung.folder, behind.folder.parent)
        assert (tuned.conversations.source, tuned.trains) == (source, "scales")
        parsed: Any = parse_job("block-ap", rung.command[rung.command.index("block-ap") + 1 :])
        assert parsed.conversations is not None
        assert (parsed.conversations.source, parsed.image_share) == (source, 0.5)
    with pytest.raises(ConfigError, match="no conversations") as raised:
        list(rungs(replace(job, images=True), Path("full")))
    assert_four_lines(raised.value)


def test_e2e_qp_runs_under_deepspeed(job: VLMLadderJob) -> None:
    words = {rung.stage: rung.command for rung in rungs(replace(job, processes=4), Path("full"))}["Block-AP + E2E-QP"]
    assert "deepspeed.launcher.runner --num_gpus 4 " in shlex.join(words or [])
    assert int(module._environment(words or [])["OMP_NUM_THREADS"]) >= 1


def test_it_runs_on_every_gpu_and_in_two_processes_without_one(
    job: VLMLadderJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    for gpus, processes in ((0, 2), (1, 1), (8, 8)):
        monkeypatch.setattr(torch.cuda, "device_count", lambda gpus=gpus: gpus)
        words = {rung.stage: rung.command for rung in rungs(job, Path("full"))}["Block-AP + E2E-QP"]
        assert f"--num_gpus {processes} " in shlex.join(words or [])


def test_a_loss_is_that_of_all_that_is_tuned(job: VLMLadderJob) -> None:
    long = replace(job, model="demo-llava", bits=(2,), lora=True, projector=True, loss="kl")
    tuned = {rung.stage for rung in rungs(long, Path("m")) if "--loss kl" in " ".join(rung.command or [])}
    assert tuned == {"Block-AP + LoRA", "Block-AP + E2E-QP", "E2E-QP + projector"}


def test_more_steps_take_as_many_conversations(job: VLMLadderJob) -> None:
    long = replace(job, model="demo-llava", bits=(2,), lora=True, steps=100)
    words = {rung.stage: shlex.join(rung.command or []) for rung in rungs(long, Path("full"))}
    for stage in ("Block-AP + LoRA", "Block-AP + E2E-QP"):
        assert "--max_steps 100 --conversations.count 3200" in words[stage]
    assert "--max_steps" not in words["Block-AP"]
    other = {rung.stage: shlex.join(rung.command or []) for rung in rungs(replace(long, model="none"), Path("full"))}
    assert "--max_steps 100 --conversations.count null" in other["Block-AP + E2E-QP"]


def test_the_results_have_one_row_per_rung(job: VLMLadderJob, ran: list[list[str]]) -> None:
    rows = vlm_ladder(job)
    found = read_json(job.output / "results.json")
    assert found["rows"] == rows
    assert found["blind_accuracy"] == 0.678
    assert [row["stage"] for row in rows] == STAGES + STAGES[1:]
    assert [row["questions"] for row in rows] == [500] + 8 * [20]
    assert all((row["accuracy"], row["by_type"]) == (0.5, {"shape": 1.0}) for row in rows)
    assert [row["bits_per_weight"] for row in rows] == [None] + 8 * [2.28]
    assert len(ran) == 8 + 9


def test_a_second_climb_asks_nothing_again_and_keeps_the_times(job: VLMLadderJob, ran: list[list[str]]) -> None:
    rows = vlm_ladder(job)
    ran.clear()
    assert vlm_ladder(job) == rows
    assert not any("eval" in words for words in ran)  # the others know themselves whether they are finished
    vlm_ladder(replace(job, overwrite=True))
    assert sum("eval" in words for words in ran) == 9


def test_a_checkpoint_that_was_made_again_is_asked_again(job: VLMLadderJob, ran: list[list[str]]) -> None:
    folder = job.output / "w2g64" / "block-ap" / "model"

    def asked_after_making(digest: str) -> list[str]:
        manifest(digest).write(folder)
        ran.clear()
        vlm_ladder(job)
        return [words[words.index("--model") + 1] for words in ran if "eval" in words]

    assert len(asked_after_making("1")) == 9
    assert asked_after_making("1") == []
    assert asked_after_making("2") == [str(folder)]


def test_another_number_of_questions_is_asked_anew(job: VLMLadderJob, ran: list[list[str]]) -> None:
    vlm_ladder(job)
    ran.clear()
    rows = vlm_ladder(replace(job, questions_full_precision=None))
    assert rows[0]["questions"] == 9673
    assert sum("eval" in words for words in ran) == 1  # the first questions are the same


def test_another_precision_asks_again(job: VLMLadderJob, ran: list[list[str]]) -> None:
    vlm_ladder(job)
    ran.clear()
    vlm_ladder(replace(job, precision="bfloat16"))
    asked = [words for words in ran if "eval" in words]
    assert len(asked) == 9
    for words in asked:
        parsed: Any = parse_job("eval", words[words.index("eval") + 1 :])
        assert parsed.precision == "bfloat16"


def test_models_are_compared_with_what_full_precision_answered(job: VLMLadderJob, ran: list[list[str]]) -> None:
    mini = replace(job, task="mini_vqa", conversations="demo-mini-vqa", projector=True)
    vlm_ladder(mini)
    asked = [words for words in ran if "eval" in words]
    kept = asked[0][asked[0].index("--output") + 1]
    assert "--reference" not in asked[0]
    assert all(words[words.index("--reference") + 1] == kept for words in asked[1:])
    assert all(words[words.index("--tasks") + 1] == "mini_vqa" for words in asked)
    parsed: Any = parse_job("eval", asked[1][asked[1].index("eval") + 1 :])
    assert (parsed.likelihood, parsed.limit, parsed.reference) == (True, 20, kept)
    learnt = [words[words.index("--conversations.source") + 1] for words in ran if "--trains" in words]
    assert learnt == ["demo-mini-vqa"] * 4
    assert [words[words.index("--trains") + 1] for words in ran if "--trains" in words] == [
        "lora",
        "scales+projector",
    ] * 2
    ran.clear()
    predictions_of(Path(kept)).unlink()
    vlm_ladder(mini)
    assert [words[words.index("--output") + 1] for words in ran if "eval" in words] == [kept]


def test_the_table_has_a_line_per_rung_and_one_for_guessing(job: VLMLadderJob, ran: list[list[str]]) -> None:
    lines = table(vlm_ladder(job), 0.678).splitlines()
    assert len(lines) == 1 + 9 + 1
    assert lines[0].split()[3:7] == ["accuracy", "NLL", "KL", "flips"]
    assert lines[1].split()[3:6] == ["50.0%", "0.250", "500"]
    assert lines[2].split()[2:7] == ["2.28", "50.0%", "0.250", "0.125", "6.2%"]
    assert [line[6:26].strip() for line in lines[1:-1]] == STAGES + STAGES[1:]
    assert lines[-1].split() == ["guessing", "blind", "67.8%"]


def test_a_command_that_fails_ends_the_ladder(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(TrainingError, match="exit status 2") as raised:
        module.run_command([sys.executable, "-m", "eqat_mm.cli", "rtn", "--model", "no-such-model"])
    assert_four_lines(raised.value)
    assert "no-such-model" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: VLMLadderJob(bits=()), "--bits"),
        (lambda: VLMLadderJob(questions=0), "--questions"),
        (lambda: VLMLadderJob(processes=0), "--processes"),
        (lambda: VLMLadderJob(questions=501), "--questions_full_precision"),
        (lambda: VLMLadderJob(questions=None), "--questions_full_precision"),
    ],
    ids=["no bits", "no questions", "no processes", "fewer in full precision", "fewer than all in full precision"],
)
def test_bad_values_are_refused(make: Callable[[], VLMLadderJob], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        make()
    assert_four_lines(raised.value)
