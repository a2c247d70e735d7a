"""DeepSpeed's settings say what the job says, or four lines say why not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from eqat_mm.cli import main
from eqat_mm.commands.line.recipes import deepspeed_path
from eqat_mm.commands.plumbing.deepspeed_file import checked, deepspeed_settings
from eqat_mm.errors import ConfigError
from eqat_mm.train.end_to_end import EndToEndConfig
from tests.checkpoint.files import assert_four_lines

JOB = EndToEndConfig(batch_size=4, accumulation=8, clip_norm=0.5)
AUTO: dict[str, Any] = {
    "fp16": {"enabled": "auto", "loss_scale": 0, "initial_scale_power": 16},
    "bf16": {"enabled": "auto"},
    "optimizer": {"type": "AdamW", "params": dict.fromkeys(("lr", "betas", "eps", "weight_decay"), "auto")},
    "scheduler": {"type": "WarmupLR", "params": dict.fromkeys(("warmup_max_lr", "warmup_num_steps"), "auto")},
    "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}, "reduce_bucket_size": "auto"},
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "train_batch_size": "auto",
    "gradient_clipping": "auto",
    "steps_per_print": 1e5,
}


@pytest.fixture(autouse=True)
def launched(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first process of two."""
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)


def written(folder: Path, settings: Any) -> str:
    file = folder / "mine.json"
    file.write_bytes(settings if isinstance(settings, bytes) else json.dumps(settings).encode())
    return str(file)


def refusal(name: str, job: EndToEndConfig = JOB) -> ConfigError:
    with pytest.raises(ConfigError) as raised:
        checked(name, job, 2)
    assert_four_lines(raised.value)
    assert raised.value.where == f"--deepspeed {name}"
    return raised.value


@pytest.mark.parametrize("name", ["zero-1", "zero-2", "zero-2-offload", "zero-3"])
def test_shipped_settings_are_taken_as_they_are(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = checked(name, JOB, 2)
    assert found.stage == int(name[5])
    assert json.loads(str(found)) == found.settings == json.loads(deepspeed_path(name).read_text())
    assert capsys.readouterr().out == ""


def test_what_is_left_to_the_trainer_is_taken_without_its_optimizer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = written(tmp_path, AUTO)
    found = checked(name, JOB, 2)
    assert "optimizer and scheduler left out" in capsys.readouterr().out
    kept = {key: value for key, value in AUTO.items() if key not in ("optimizer", "scheduler")}
    assert found.settings == kept | {"zero_force_ds_cpu_optimizer": False}


def test_the_same_numbers_are_taken(tmp_path: Path) -> None:
    numbers = {"train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 8, "train_batch_size": 64}
    settings = numbers | {"gradient_clipping": 0.5, "fp16": {"enabled": False}}
    assert checked(written(tmp_path, settings), JOB, 2).settings == settings


@pytest.mark.parametrize(
    ("changed", "given", "allowed"),
    [
        ({"train_micro_batch_size_per_gpu": 2}, '"train_micro_batch_size_per_gpu": 2, and --batch_size 4', "4 or"),
        ({"gradient_accumulation_steps": 1}, '"gradient_accumulation_steps": 1, and --accumulation 8', "8 or"),
        ({"gradient_clipping": 1.0}, '"gradient_clipping": 1.0, and --clip_norm 0.5', "0.5 or"),
        ({"train_batch_size": 32}, '"train_batch_size": 32, and 64', "64 or"),
        ({"fp16": {"enabled": True}}, '"fp16" enabled', "--precision"),
        ({"bf16": {"enabled": True}}, '"bf16" enabled', "--precision"),
        ({"amp": {"enabled": True}}, '"amp" enabled', "--precision"),
        ({"optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}}, "lr: 0.001", "--learning_rate"),
        ({"optimizer": {"type": "Lion", "params": {"lr": "auto"}}}, "type: 'Lion'", "--learning_rate"),
        ({"optimizer": {"params": 3}}, "params: 3", "--learning_rate"),
        ({"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 9}}}, "warmup_num_steps: 9", "options"),
        ({"zero_optimization": 2}, '"zero_optimization": 2', "an object"),
        ({"zero_optimization": {"stage": "two"}}, "stage", "0, 1, 2 or 3"),
        ({"zero_optimization": {"stage": [2]}}, "stage", "0, 1, 2 or 3"),
        ({"fp16": True}, '"fp16": True', "an object"),
    ],
)
def test_what_contradicts_the_job_is_refused(tmp_path: Path, changed: dict[str, Any], given: str, allowed: str) -> None:
    refused = refusal(written(tmp_path, AUTO | changed))
    assert given in refused.given
    assert allowed in refused.allowed


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"3", b"\xff\xfe{}", b"[" * 100_000], ids=repr)
def test_what_is_no_json_object_is_refused(tmp_path: Path, text: bytes) -> None:
    refusal(written(tmp_path, text[:200_000]))


def test_an_unknown_name_is_answered_with_the_shipped_ones() -> None:
    with pytest.raises(ConfigError) as raised:
        checked("zero2", JOB, 2)
    assert "zero-2-offload" in raised.value.allowed
    assert raised.value.do == "did you mean zero-2?"


def test_the_file_is_checked_without_a_launcher_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_RANK")
    monkeypatch.delenv("WORLD_SIZE")
    good = EndToEndConfig(deepspeed=written(tmp_path, AUTO | {"train_batch_size": 64}))
    assert deepspeed_settings(good) is None
    with pytest.raises(ConfigError):
        deepspeed_settings(EndToEndConfig(deepspeed=written(tmp_path, b"{")))


@pytest.mark.parametrize("command", ["e2e-qp", "llm-qat"])
def test_a_bad_file_ends_a_command_before_it_looks_for_a_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    file = written(tmp_path, {"fp16": {"enabled": True}})
    output = tmp_path / "run"
    assert main([command, "--model", str(tmp_path / "none"), "--deepspeed", file, "--output", str(output)]) == 2
    first, where, *rest = capsys.readouterr().err.splitlines()
    assert (first, where.split()[1:]) == ("ConfigError", ["--deepspeed", file])
    assert len(rest) == 3
    assert not output.exists()
