"""Blocks that are not finite before they are trained: one error at once, which names the weight or the samples."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from eqat_mm.blocks.source import open_model
from eqat_mm.blocks.walker import BlockStep, BlockWalker, capture_front
from eqat_mm.errors import TrainingError
from eqat_mm.quant.init import Init
from eqat_mm.train import fit, warm_start
from eqat_mm.train.block_ap import BlockAPConfig, quantize_block, run_block_ap
from eqat_mm.train.fit import FitConfig, fit_block
from eqat_mm.train.report import FitReport
from eqat_mm.train.warm_start import WarmStartConfig
from llava_adapters.llama import ARCH
from tests.checkpoint.files import assert_four_lines, contents
from tests.tiny_model import Tiny
from tests.train.problems import CPU, SAMPLES, SPEC, batches_of, step_to_fit

INITS: list[Init] = ["minmax", "search", "gptq", "refined"]
TRAINING, VALIDATION = 7, 1


def config_of(init: Init = "minmax", epochs: int = 1) -> BlockAPConfig:
    return BlockAPConfig(
        SPEC, start=WarmStartConfig(init, samples=16), fit=FitConfig(epochs=epochs, validation_samples=3)
    )


def broken_walker(tiny: Tiny, sample: int, value: float) -> BlockWalker:
    """Both streams at the input of block 0, one number of one sample replaced in both."""
    opened = open_model(tiny.folder, ARCH)
    captured = capture_front(opened, batches_of(tiny), torch.float32)
    walker = BlockWalker(opened, captured, device=CPU, batch_tokens=64)
    for stream in (walker.fp, walker.quantized):
        hidden = stream.read(sample).clone()
        hidden[0, 3, 5] = value
        stream.write(sample, hidden)
    return walker


def error_of(walker: BlockWalker, step: BlockStep, config: BlockAPConfig) -> TrainingError:
    with pytest.raises(TrainingError) as raised:
        quantize_block(walker, step, config)
    assert_four_lines(raised.value)
    assert "no learning rate" in raised.value.allowed
    return raised.value


@pytest.mark.parametrize("epochs", [0, 1])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("init", INITS)
def test_a_weight_is_named(walker: BlockWalker, init: Init, value: float, epochs: int) -> None:
    step = next(walker.walk())
    with torch.no_grad():
        step.block.get_parameter("mlp.down_proj.weight")[3, 5] = value
    error = error_of(walker, step, config_of(init, epochs))
    assert error.where.startswith("model.layers.0.mlp.down_proj.weight")


@pytest.mark.parametrize("epochs", [0, 1])
@pytest.mark.parametrize("sample", [TRAINING, VALIDATION])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("init", INITS)
def test_samples_are_named(tiny: Tiny, init: Init, value: float, sample: int, epochs: int) -> None:
    walker = broken_walker(tiny, sample, value)
    error = error_of(walker, next(walker.walk()), config_of(init, epochs))
    assert error.where == f"model.layers.0, calibration samples {sample} (1 in all)"
    assert "the block's input, in the quantized stream, is not finite" in error.given


def test_targets_are_named(walker: BlockWalker) -> None:
    step = step_to_fit(walker)
    step.fp.write(2, torch.full_like(step.fp.read(2), math.nan))
    with pytest.raises(TrainingError, match=r"samples 2 .*\n.*the block's full-precision stream") as raised:
        fit_block(walker, step, FitConfig(epochs=0, validation_samples=3), seed=0)
    assert "a loss of nan before the first step" in raised.value.given


@pytest.mark.parametrize("samples", [range(3, 4), range(3, 12)])
def test_a_training_sample_of_the_quantized_stream_alone_is_named(
    walker: BlockWalker, samples: range, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = step_to_fit(walker)
    for sample in samples:
        step.quantized.write(sample, torch.full_like(step.quantized.read(sample), math.nan))
    steps: list[int] = []
    take = fit._BlockFit._step
    monkeypatch.setattr(fit._BlockFit, "_step", lambda self, *args: steps.append(0) or take(self, *args))
    with pytest.raises(TrainingError, match=rf"samples 3.* \({len(samples)} in all\)"):
        fit_block(walker, step, FitConfig(epochs=9, validation_samples=3), seed=0)
    assert len(steps) <= 10


def test_numbers_that_are_only_too_large_are_told_apart(tiny: Tiny) -> None:
    walker = broken_walker(tiny, VALIDATION, 1e30)
    step = next(walker.walk())
    with torch.no_grad():
        step.block.get_parameter("mlp.down_proj.weight").mul_(1e25)
    error = error_of(walker, step, config_of())
    assert "a mean square of inf" in error.given


def test_nothing_is_written_of_a_run_with_a_broken_embedding(tiny: Tiny, tmp_path: Path) -> None:
    opened = open_model(tiny.folder, ARCH)
    batches = batches_of(tiny)
    read = opened.source.read
    broken = batches[VALIDATION]["input_ids"][0, 4]

    def with_nan(name: str, *args: Any) -> Any:
        tensor = read(name, *args)
        if name == "model.embed_tokens.weight":
            tensor = tensor.clone()
            tensor[broken] = math.nan
        return tensor

    opened.source.read = with_nan  # type: ignore[method-assign]
    with pytest.raises(TrainingError, match=r"calibration samples .*\b1\b"):
        run_block_ap(opened, batches, config_of(), tmp_path, device=CPU, source="tiny", provenance={"config": {}})
    assert not [name for name in contents(tmp_path) if name.endswith(".safetensors")]


# ---- statistics that cannot be inverted ----------------------------------------------------------


@pytest.mark.parametrize("init", ["gptq", "refined"])
def test_statistics_are_damped_until_they_can_be_inverted(
    walker: BlockWalker, init: Init, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[float] = []
    real = warm_start._grid_at

    def hard(weight: Any, seen: Any, spec: Any, config: Any, layer: str, more: float) -> Any:
        if layer.endswith("o_proj"):
            asked.append(more)
            if more == 0.0:
                raise torch.linalg.LinAlgError("not positive-definite")
        return real(weight, seen, spec, config, layer, more)

    monkeypatch.setattr(warm_start, "_grid_at", hard)
    quantize_block(walker, next(walker.walk()), config_of(init))
    assert asked == [0.0, 0.5]
    said = capsys.readouterr().out
    assert said.count("model.layers.0.self_attn.o_proj: its statistics cannot be inverted as they are") == 1


def test_statistics_that_never_can_be_inverted_are_an_error(
    walker: BlockWalker, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*args: Any) -> Any:
        raise torch.linalg.LinAlgError("not positive-definite")

    monkeypatch.setattr(warm_start, "_grid_at", never)
    error = error_of(walker, next(walker.walk()), config_of("gptq"))
    assert error.where == "model.layers.0"
    assert "self_attn.q_proj: statistics of its inputs that cannot be inverted" in error.given


# ---- records -------------------------------------------------------------------------------------


def test_records_hold_no_numbers_that_json_has_not(tiny: Tiny, tmp_path: Path) -> None:
    """A block of zeros: its targets are its inputs, and those of a model of zeros are zeros."""
    opened = open_model(tiny.folder, ARCH)
    read = opened.source.read
    opened.source.read = lambda name, *args: read(name, *args) * 0  # type: ignore[method-assign]
    run_block_ap(opened, batches_of(tiny), config_of(), tmp_path, device=CPU, source="tiny", provenance={"config": {}})
    lines = (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line, parse_constant=pytest.fail) for line in lines]
    assert [record["relative_error"] for record in records] == [None] * 3
    assert len(batches_of(tiny)) == SAMPLES


def test_the_relative_error_is_that_of_the_kept_weights() -> None:
    report = FitReport(loss_before=4.0, loss_after=1.0)
    assert report.relative_error(4.0) == 0.5
    assert report.relative_error(0.0) is None
