"""`eqat eval` and `eqat generate` as jobs."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from eqat_eval.perplexity import evaluate_perplexity
from eqat_mm.blocks.source import SINGLE
from eqat_mm.checkpoint.folders import load_tokenizer
from eqat_mm.cli import run_command
from eqat_mm.commands import evaluate as evaluate_module
from eqat_mm.commands.evaluate import Bench, EvalJob, bits_per_weight, evaluate
from eqat_mm.commands.generate import GenerateJob, generate
from eqat_mm.commands.models import load_model
from eqat_mm.commands.quantize import rtn
from eqat_mm.data.windows import text_windows
from eqat_mm.errors import CheckpointError
from tests.commands.jobs import SPEC, rtn_job
from tests.tiny_model import Tiny

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def packed(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return rtn(rtn_job(tiny, tmp_path_factory.mktemp("packed")))


def job_of(
    tiny: Tiny, model: Path, output: Path | None = None, reference: Path | None = None, device: str = "cpu"
) -> EvalJob:
    data = tiny.windows(4, held_out=True)
    return EvalJob(str(model), None if reference is None else str(reference), data, device=device, output=output)


def test_a_packed_model_is_compared_with_its_source(tiny: Tiny, packed: Path, tmp_path: Path) -> None:
    result = evaluate(job_of(tiny, packed, tmp_path / "result.json", tiny.folder))
    assert json.loads((tmp_path / "result.json").read_text(encoding="utf-8")) == result
    assert result["bits_per_weight"] == pytest.approx(SPEC.bits_per_weight(64))
    assert result["kl"] > 0
    assert 0 < result["top1_agreement"] < 1


def test_the_perplexity_is_that_of_the_model_in_float32(tiny: Tiny) -> None:
    result = evaluate(job_of(tiny, tiny.folder))
    windows = text_windows(load_tokenizer(tiny.folder), tiny.windows(4, held_out=True))
    assert result["perplexity"] == evaluate_perplexity(load_model(tiny.folder, CPU), windows, batch_size=4).perplexity
    assert (result["bits_per_weight"], result["kl"], result["top1_agreement"]) == (None, None, None)


@pytest.mark.parametrize("asked", [{"dtype": "bfloat16"}, {"precision": "bfloat16"}], ids=["all", "products"])
def test_bfloat16_holds_for_the_reference_too(
    tiny: Tiny, packed: Path, monkeypatch: pytest.MonkeyPatch, asked: dict[str, Any]
) -> None:
    heads: list[tuple[torch.dtype, torch.dtype]] = []

    def spy(folder: Path, device: torch.device, dtype: torch.dtype) -> Any:
        model = load_model(folder, device, dtype)
        model.lm_head.register_forward_hook(  # type: ignore[operator]
            lambda head, _, logits: heads.append((head.weight.dtype, logits.dtype))
        )
        return model

    monkeypatch.setattr(evaluate_module, "load_model", spy)
    result = evaluate(replace(job_of(tiny, packed, reference=tiny.folder), **asked))
    weights = torch.bfloat16 if "dtype" in asked else torch.float32
    assert set(heads) == {(weights, torch.bfloat16)}
    assert result["precision"] == "bfloat16"
    assert result["kl"] == pytest.approx(evaluate(job_of(tiny, packed, reference=tiny.folder))["kl"], rel=0.05)


def spoil(folder: Path, name: str) -> None:
    """Put one NaN into a tensor of a full-precision model."""
    tensors = load_file(folder / SINGLE)
    tensors[name].view(-1)[7] = torch.nan
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})


@pytest.mark.parametrize("which", ["model", "reference"])
def test_predictions_that_are_not_finite_are_no_result(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str], which: str
) -> None:
    folders = {name: tmp_path / name for name in ("model", "reference")}
    for folder in folders.values():
        shutil.copytree(tiny.folder, folder)
    spoil(folders[which], "model.layers.1.mlp.up_proj.weight")
    flags = [f"--{name}={folder}" for name, folder in folders.items()]
    data = json.dumps({"source": str(tiny.text), "length": 16, "count": 4, "part": "held_out"})
    output = tmp_path / "result.json"
    assert run_command("eval", [*flags, "--data", data, "--device", "cpu", "--output", str(output)]) == 2
    said = capsys.readouterr().err
    assert "model.layers.1.mlp.up_proj.weight" in said
    assert "Traceback" not in said
    assert not output.exists()


def test_a_row_of_a_table_is_finite(tiny: Tiny, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny.folder, tmp_path / "model"))
    spoil(folder, "lm_head.weight")
    windows = text_windows(load_tokenizer(tiny.folder), tiny.windows(4, held_out=True))
    bench = Bench(tiny.folder, windows, 2, None, CPU)
    json.dumps(bench.row(tiny.folder), allow_nan=False)
    with pytest.raises(CheckpointError, match="lm_head"):
        bench.row(folder)


def test_one_line_says_the_result(tiny: Tiny, packed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = evaluate(job_of(tiny, packed, reference=tiny.folder))
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"{packed}: perplexity {result['perplexity']:.3f} on 60 tokens, KL {result['kl']:.4f}")


def test_full_precision_has_no_bits_per_weight(tiny: Tiny) -> None:
    assert bits_per_weight(tiny.folder) is None


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
@pytest.mark.parametrize("quantized", [False, True], ids=["full precision", "packed"])
def test_text_is_written(
    tiny: Tiny, packed: Path, capsys: pytest.CaptureFixture[str], quantized: bool, dtype: Any
) -> None:
    model = packed if quantized else tiny.folder
    text = generate(GenerateJob(str(model), prompt="w5 w17 w42", max_new_tokens=8, device="cpu", dtype=dtype))
    said = capsys.readouterr().out
    assert text.strip() in said
    assert "tokens/s]" in said
