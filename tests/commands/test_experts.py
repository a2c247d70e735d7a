"""A mixture of experts through every command, from a published folder to plain transformers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from eqat_mm.blocks.walker import BlockStep, BlockWalker
from eqat_mm.checkpoint.folders import load_for_inference
from eqat_mm.commands.evaluate import EvalJob, evaluate
from eqat_mm.commands.generate import GenerateJob, generate
from eqat_mm.commands.llm_qat import llm_qat
from eqat_mm.commands.quantize import block_ap, rtn
from eqat_mm.commands.tune import e2e_qp
from eqat_mm.quant.spec import QuantSpec
from eqat_mm.runtime.files import read_json
from eqat_mm.train import block_ap as trainer
from eqat_mm.train.block_ap import BlockAPConfig
from eqat_mm.train.warm_start import WarmStartConfig
from llava_adapters import arch_for
from tests.checkpoint.files import same_weights
from tests.commands.jobs import block_ap_job, e2e_qp_job, llm_qat_job, rtn_job
from tests.tiny_model import Tiny, save_text, word_tokenizer

SPEC = QuantSpec(4, 32, symmetric=True)


@pytest.fixture(scope="module", params=["mixtral", "qwen3_moe"])
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    folder = tmp_path_factory.mktemp(request.param)
    model, _ = arch_for(request.param).tiny()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.2)
    nn.Module.to(model, torch.bfloat16).save_pretrained(folder / "model")
    word_tokenizer().save_pretrained(folder / "model")
    save_text(folder / "text.txt")
    return Tiny(folder / "model", folder / "text.txt")


@pytest.fixture(scope="module")
def trained(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Block-AP, then E2E-QP."""
    folder = tmp_path_factory.mktemp("runs")
    first = block_ap(block_ap_job(tiny, folder / "bap", quant=SPEC, start=WarmStartConfig(init="refined")))
    return e2e_qp(e2e_qp_job(tiny, first, folder / "e2e", quant=SPEC))


def divergence(tiny: Tiny, model: Path) -> float:
    """KL of a packed model to the full-precision one on held-out text."""
    job = EvalJob(model=str(model), reference=str(tiny.folder), data=tiny.windows(4, held_out=True), device="cpu")
    return float(evaluate(job)["kl"])


def test_training_leaves_less_than_rounding(tiny: Tiny, trained: Path, tmp_path: Path) -> None:
    rounded = rtn(rtn_job(tiny, tmp_path, quant=replace(SPEC, bits=2)))
    assert divergence(tiny, trained) < divergence(tiny, rounded)


def test_a_run_that_was_stopped_goes_on_to_the_same_weights(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = [block_ap_job(tiny, tmp_path / name, quant=SPEC) for name in ("whole", "stopped")]
    whole = block_ap(jobs[0])
    plain = trainer.quantize_block

    def stopping(walker: BlockWalker, step: BlockStep, config: BlockAPConfig) -> Any:
        if step.index == 1:
            raise KeyboardInterrupt
        return plain(walker, step, config)

    monkeypatch.setattr(trainer, "quantize_block", stopping)
    with pytest.raises(KeyboardInterrupt):
        block_ap(jobs[1])
    monkeypatch.setattr(trainer, "quantize_block", plain)
    assert same_weights(whole, block_ap(jobs[1]))


def test_plain_transformers_predicts_the_same(tiny: Tiny, trained: Path) -> None:
    ours = load_for_inference(trained, torch.device("cpu"))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(trained, dtype=torch.float32).eval()
    tokens = torch.randint(2, 97, (2, 16))
    with torch.no_grad():
        found, expected = (model(tokens, use_cache=False).logits for model in (theirs, ours))
    assert (found - expected).norm() < 1e-2 * expected.norm()


def test_a_model_writes_text(trained: Path) -> None:
    written = generate(GenerateJob(model=str(trained), prompt="w5 w6", max_new_tokens=4, device="cpu"))
    assert written


def test_llm_qat_trains_experts_too(tiny: Tiny, tmp_path: Path) -> None:
    folder = llm_qat(llm_qat_job(tiny, tmp_path, bits="4-8-8", group_size=32, smooth=0.5, max_steps=2))
    assert divergence(tiny, folder) < 2
    assert read_json(folder / "config.json")["quantization_config"]["kv_cache_scheme"]["num_bits"] == 8


def test_the_asymmetric_grid_is_said_to_be_for_this_package_alone(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = rtn(rtn_job(tiny, tmp_path, quant=QuantSpec(4, 32)))
    assert "experts on the symmetric grid only: --quant.symmetric true" in capsys.readouterr().out
    assert divergence(tiny, folder) < 2
    with pytest.raises(RuntimeError, match="automatic conversion"):
        transformers.AutoModelForCausalLM.from_pretrained(folder)
