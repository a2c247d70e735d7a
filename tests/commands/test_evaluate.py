"""`eqat eval`, `eqat generate` and `eqat assets` as jobs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from eqat_eval.perplexity import evaluate_perplexity
from eqat_mm.checkpoint.folders import load_tokenizer
from eqat_mm.commands.assets import AssetsJob, assets
from eqat_mm.commands.evaluate import EvalJob, bits_per_weight, evaluate
from eqat_mm.commands.generate import GenerateJob, generate
from eqat_mm.commands.models import load_model
from eqat_mm.commands.quantize import rtn
from eqat_mm.data.assets import ASSETS
from eqat_mm.data.windows import text_windows
from llava_adapters.registry import ALIASES
from tests.commands.jobs import SPEC, rtn_job
from tests.tiny_model import Tiny

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def packed(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return rtn(rtn_job(tiny, tmp_path_factory.mktemp("packed")))


def job_of(tiny: Tiny, model: Path, output: Path | None = None, reference: Path | None = None) -> EvalJob:
    data = tiny.windows(4, held_out=True)
    return EvalJob(str(model), None if reference is None else str(reference), data, device="cpu", output=output)


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


def test_one_line_says_the_result(tiny: Tiny, packed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = evaluate(job_of(tiny, packed, reference=tiny.folder))
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"{packed}: perplexity {result['perplexity']:.3f} on 60 tokens, KL {result['kl']:.4f}")


def test_full_precision_has_no_bits_per_weight(tiny: Tiny) -> None:
    assert bits_per_weight(tiny.folder) is None


@pytest.mark.parametrize("quantized", [False, True], ids=["full precision", "packed"])
def test_text_is_written(tiny: Tiny, packed: Path, capsys: pytest.CaptureFixture[str], quantized: bool) -> None:
    model = packed if quantized else tiny.folder
    text = generate(GenerateJob(str(model), prompt="w5 w17 w42", max_new_tokens=8, device="cpu"))
    said = capsys.readouterr().out
    assert text.strip() in said
    assert "tokens/s]" in said


def test_the_list_of_assets_names_all(capsys: pytest.CaptureFixture[str]) -> None:
    assets(AssetsJob())
    said = capsys.readouterr().out
    assert all(name in said for name in (*ASSETS, *ALIASES))
