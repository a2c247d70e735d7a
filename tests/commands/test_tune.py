"""`eqat e2e-qp` as a job: from one folder to another."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

from eqat_mm.checkpoint.read import load
from eqat_mm.checkpoint.verify import verify_checkpoint
from eqat_mm.checkpoint.write import save_like
from eqat_mm.cli import parse_job
from eqat_mm.commands.plumbing.launchers import say_which_gpu
from eqat_mm.commands.plumbing.runs import default_output
from eqat_mm.commands.verbs import tune
from eqat_mm.commands.verbs.quantize import BlockAPJob, block_ap, rtn
from eqat_mm.commands.verbs.tune import e2e_qp
from eqat_mm.errors import CheckpointError, ConfigError, TrainingError
from eqat_mm.quant.spec import QuantSpec
from tests.checkpoint.files import assert_four_lines, contents, same_bytes, same_weights, tensors_of
from tests.commands.jobs import block_ap_job, e2e_qp_job, rtn_job
from tests.tiny_model import Tiny
from tests.train.stopping import Stopped, stop_at_step


@pytest.fixture(scope="module")
def base(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Packed by round-to-nearest; not to be altered."""
    return rtn(rtn_job(tiny, tmp_path_factory.mktemp("base")))


@pytest.fixture(scope="module")
def tuned(tiny: Tiny, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run folder of E2E-QP; not to be altered."""
    folder = tmp_path_factory.mktemp("tuned")
    e2e_qp(e2e_qp_job(tiny, base, folder))
    return folder


def test_only_the_step_sizes_differ_from_the_base(base: Path, tuned: Path) -> None:
    before, after = tensors_of(base), tensors_of(tuned / "model")
    assert before.keys() == after.keys()
    changed = {name for name in before if not same_bytes(before[name], after[name])}
    assert changed == {name for name in before if name.endswith(".weight_scale")}
    assert all(after[name].dtype is torch.bfloat16 for name in changed)


def test_what_is_stored_is_what_was_trained(tiny: Tiny, base: Path, tmp_path: Path) -> None:
    trained: list[Any] = []

    def spy(model: Any, *args: Any) -> Any:
        trained.append(model)
        return save_like(model, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tune, "save_like", spy)
        folder = e2e_qp(e2e_qp_job(tiny, base, tmp_path))
    tokens = torch.tensor([[2, 3, 4, 5]])
    with torch.no_grad():
        assert torch.equal(load(folder)(input_ids=tokens).logits, trained[0].eval()(input_ids=tokens).logits)


def test_the_history_of_the_checkpoint_is_kept(tiny: Tiny, tuned: Path) -> None:
    manifest = verify_checkpoint(tuned / "model")
    assert manifest.stage == "e2e-qp"
    assert manifest.source == str(tiny.folder)
    assert [record["command"] for record in manifest.provenance] == ["rtn", "e2e-qp"]
    assert manifest.provenance[-1]["config"]["learning_rate"] == 2e-3


def test_the_run_folder_holds_metrics_and_no_left_overs(tuned: Path) -> None:
    assert {path.name for path in tuned.iterdir()} == {"model", "metrics.jsonl", "run.json"}
    records = [json.loads(line) for line in (tuned / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    losses = [record["loss"] for record in records if "loss" in record]
    assert len(losses) == 6
    assert all(0 < loss < 10 for loss in losses)


def test_a_finished_run_is_not_repeated(
    tiny: Tiny, base: Path, tuned: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(tuned)
    e2e_qp(e2e_qp_job(tiny, base.parent, tuned))  # the run that made it stands for it
    assert "already finished" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="learning_rate"):
        e2e_qp(e2e_qp_job(tiny, base, tuned, learning_rate=1e-3))
    assert contents(tuned) == before


def test_a_stopped_run_is_continued_under_its_own_settings(
    tiny: Tiny, base: Path, tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = stop_at_step(monkeypatch, 4)
    with pytest.raises(Stopped):
        e2e_qp(e2e_qp_job(tiny, base, tmp_path, save_steps=2))
    with pytest.raises(ConfigError, match="learning_rate"):
        e2e_qp(e2e_qp_job(tiny, base, tmp_path, save_steps=2, learning_rate=1e-3))
    e2e_qp(e2e_qp_job(tiny, base, tmp_path, save_steps=2))
    assert len(steps) == 4 + 4
    assert same_weights(tmp_path / "model", tuned / "model")
    assert not (tmp_path / "trainer").exists()


def test_training_that_fails_leaves_no_checkpoint(
    tiny: Tiny, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise TrainingError("E2E-QP", "nan", "finite numbers", "lower the learning rate")

    monkeypatch.setattr(tune, "run_e2e_qp", broken)
    with pytest.raises(TrainingError):
        e2e_qp(e2e_qp_job(tiny, base, tmp_path))
    assert not (tmp_path / "model").exists()


def test_block_ap_is_found_by_model_and_spec(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    block_ap(block_ap_job(tiny, None))
    assert e2e_qp(e2e_qp_job(tiny, None, None)) == Path("runs/tiny-llama-w2g32/e2e-qp/model")


@pytest.mark.parametrize("spec", [QuantSpec(3, 64), QuantSpec(2, 32, symmetric=True)], ids=lambda spec: spec.name)
@pytest.mark.parametrize("named", [False, True], ids=["default", "named"])
def test_without_block_ap_the_message_has_the_command_that_makes_it(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: QuantSpec, named: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError) as raised:
        e2e_qp(e2e_qp_job(tiny, Path("mine/model") if named else None, None, quant=spec))
    assert_four_lines(raised.value)
    words = shlex.split(raised.value.do.removeprefix("make it first: ").partition(", or ")[0])
    assert words[:2] == ["eqat", "block-ap"]
    job: BlockAPJob = parse_job("block-ap", words[2:])
    assert (job.model, job.quant) == (str(tiny.folder), spec)
    folder = job.output or default_output(job.model, job.quant) / "block-ap"
    assert raised.value.where == f"--quantized {folder / 'model'}"


def test_a_run_does_not_overwrite_what_it_starts_from(tiny: Tiny, base: Path) -> None:
    before = contents(base)
    with pytest.raises(ConfigError, match="a folder of its own") as raised:
        e2e_qp(e2e_qp_job(tiny, base, base.parent, overwrite=True))
    assert_four_lines(raised.value)
    assert contents(base) == before


@pytest.mark.parametrize(
    ("command", "device", "launched", "said"),
    [
        (
            "e2e-qp",
            "cuda:1",
            False,
            "e2e-qp on cuda:1, one of 4 GPUs; .*--num_gpus 4 --module eqat_mm e2e-qp",
        ),
        (
            "llm-qat",
            "cuda:0",
            False,
            "llm-qat on cuda:0, one of 4 GPUs; .*--num_gpus 4 --module eqat_mm llm-qat",
        ),
        ("e2e-qp", "cuda:1", True, ""),
        ("e2e-qp", "cpu", False, ""),
        ("round-to-nearest", "cuda:0", False, ""),
    ],
)
def test_who_trains_on_one_of_several_gpus_learns_how_to_use_all(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: str,
    device: str,
    launched: bool,
    said: str,
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    if launched:
        monkeypatch.setenv("LOCAL_RANK", "0")
    say_which_gpu(command, torch.device(device))
    printed = capsys.readouterr().out
    assert re.match(said, printed) if said else printed == ""
