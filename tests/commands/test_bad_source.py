"""A source that is not what it seems: every command that reads it refuses at once, and leaves everything as it was."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from eqat_mm.cli import main
from eqat_mm.commands.verbs.quantize import rtn
from eqat_mm.runtime.files import read_json, write_json
from tests.checkpoint.files import contents
from tests.commands.jobs import rtn_job
from tests.tiny_model import Tiny

WEIGHTS = "model.safetensors"
DOWN = "model.layers.1.mlp.down_proj.weight"


def weights(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    """Return what alters the weights in a model folder."""

    def damage(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})

    return damage


def configuration(**changes: object) -> Callable[[Path], None]:
    """Return what alters config.json in a model folder."""
    return lambda folder: write_json(folder / "config.json", read_json(folder / "config.json") | changes)


def to_fp8(tensors: dict[str, Tensor]) -> None:
    tensors[DOWN] = tensors[DOWN].to(torch.float8_e4m3fn)
    tensors[f"{DOWN}_scale_inv"] = torch.ones(1, 1)


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no head": (weights(lambda tensors: tensors.pop("lm_head.weight")), "no tensor lm_head.weight"),
    "another shape": (weights(lambda tensors: tensors.update({DOWN: tensors[DOWN].T.contiguous()})), "shape [128, 64]"),
    "quantized": (weights(to_fp8), "quantized already, by fp8"),
    "not finite": (weights(lambda tensors: tensors[DOWN][3, 5:7].fill_(float("nan"))), "2 of 8192 values"),
    "half of it": (configuration(num_hidden_layers=1), "beyond those that config.json counts"),
    "no such activation": (configuration(hidden_act="nope"), "no usable configuration"),
    "a cut configuration": (lambda folder: (folder / "config.json").write_bytes(b'{"model_type": "lla'), "JSON"),
    "settings of generation": (lambda folder: (folder / "generation_config.json").write_bytes(b"[]"), "generation"),
}
COMMANDS = ["rtn", "block-ap", "llm-qat", "eval", "eval --reference", "generate", "generate-data", "e2e-qp"]


@pytest.fixture(scope="module")
def rounded(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return rtn(rtn_job(tiny, tmp_path_factory.mktemp("rounded")))


def command_line(command: str, model: Path, tiny: Tiny, rounded: Path, output: Path) -> list[str]:
    """Return the words of a command that reads the full-precision model, overwriting an older result."""
    source, tuned = ["--model", str(model)], ["--recipe_for", json.dumps([str(model)])]
    data = json.dumps({"source": str(tiny.text), "length": 16, "count": 12})
    over, cpu = ["--output", str(output), "--overwrite"], ["--device", "cpu"]
    return {
        "rtn": ["rtn", *source, "--quant.group_size", "32", *over],
        "block-ap": ["block-ap", *source, *tuned, "--quant.group_size", "32", "--calibration", data, *cpu, *over],
        "llm-qat": ["llm-qat", *source, *tuned, "--data", data, "--max_steps", "1", *cpu, *over],
        "eval": ["eval", *source, "--data", data, *cpu],
        "eval --reference": ["eval", "--model", str(rounded), "--reference", str(model), "--data", data, *cpu],
        "generate": ["generate", *source, "--prompt", "w5", *cpu],
        "generate-data": [
            "generate-data",
            *source,
            "--count",
            "2",
            "--length",
            "16",
            *cpu,
            *over[:1],
            f"{output}.jsonl",
        ],
        "e2e-qp": [
            *("e2e-qp", *source, *tuned, "--quantized", str(rounded), "--loss", "kl", "--data", data),
            *("--max_steps", "1", *cpu, *over),
        ],
    }[command]


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("fault", list(FAULTS))
def test_it_is_refused(
    tiny: Tiny, rounded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], fault: str, command: str
) -> None:
    damage, expected = FAULTS[fault]
    model, output = tmp_path / "source", tmp_path / "run"
    shutil.copytree(tiny.folder, model)
    shutil.copytree(rounded.parent, output)  # a finished run, which --overwrite would discard
    damage(model)
    before = contents(tmp_path)
    assert main(command_line(command, model, tiny, rounded, output)) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    lines = said.splitlines()[-5:]
    assert lines[0] == "CheckpointError"
    assert [line.split()[0] for line in lines[1:]] == ["where:", "given:", "allowed:", "do:"]
    assert str(model) in lines[1]
    assert expected in "\n".join(lines)
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    "content",
    [
        b'{"model_type": "lla',
        b"[]",
        b'{"model_type": "llama", "num_attention_heads": 0}',
        b'{"model_type": "llama", "num_hidden_layers": 1000000000}',
        b'{"model_type": "llama", "hidden_act": "nope"}',
        b'{"model_type": "llama", "hidden_size": 1000000000000000}',
    ],
    ids=lambda content: content.decode()[-24:],
)
def test_a_plan_of_a_broken_configuration(tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes) -> None:
    """It reads nothing else of a model."""
    (tmp_path / "config.json").write_bytes(content)
    assert main(["plan", "--model", str(tmp_path), "--recipe_for", "[]", "--gpu", "a100"]) == 2
    lines = capsys.readouterr().err.splitlines()[-5:]
    assert lines[0] == "CheckpointError"
    assert lines[1] == f"  where:   {tmp_path / 'config.json'}"
