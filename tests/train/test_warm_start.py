"""Where the grids of a block start, measured at the block's output."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from eqat_mm.blocks.walker import BlockStep, BlockWalker
from eqat_mm.errors import ConfigError
from eqat_mm.quant.grid import dequantize, quantize
from eqat_mm.quant.init import Grid, Init, initial_grid
from eqat_mm.quant.spec import QuantSpec
from eqat_mm.train.block_ap import BlockAPConfig, quantize_block
from eqat_mm.train.fit import FitConfig
from eqat_mm.train.losses import block_loss
from eqat_mm.train.warm_start import WarmStartConfig, initial_grids
from llava_adapters.llama import ARCH
from tests.tiny_model import Tiny
from tests.train.problems import SAMPLES, SPEC, step_behind_rounded_block, values_of, walker_of

TRAINED, HELD_OUT = range(3, SAMPLES), range(3)
INITS: tuple[Init, ...] = ("minmax", "search", "gptq", "refined")


@pytest.fixture
def step(walker: BlockWalker) -> BlockStep:
    return step_behind_rounded_block(walker)


def grids_of(walker: BlockWalker, step: BlockStep, init: Init, spec: QuantSpec = SPEC) -> dict[str, Grid]:
    return initial_grids(walker, step, spec, WarmStartConfig(init=init), TRAINED)


@torch.no_grad()
def output_error(walker: BlockWalker, step: BlockStep, grids: dict[str, Grid], spec: QuantSpec) -> float:
    """Error of the rounded block on the quantized stream against the full-precision one on its own."""
    rounded = copy.deepcopy(step.block)
    for path, linear in ARCH.named_linears(rounded):
        grid = grids[path]
        codes = quantize(linear.weight if grid.weight is None else grid.weight, grid.scale, grid.zero_point, spec)
        linear.weight = nn.Parameter(dequantize(codes, grid.scale, grid.zero_point))
    errors = []
    for index in TRAINED:
        call = step.calls[index]
        target = walker.run(step.block, call, step.fp.read(index))
        errors.append(block_loss(walker.run(rounded, call, step.quantized.read(index)), target).item())
    return sum(errors) / len(errors)


def add_noise(step: BlockStep, samples: range) -> None:
    """Change what both streams hold of some samples."""
    for stream in (step.fp, step.quantized):
        for index in samples:
            stream.write(index, stream.read(index) + 10 * torch.randn(stream.read(index).shape))


def same_grids(left: dict[str, Grid], right: dict[str, Grid]) -> bool:
    def equal(a: Tensor | None, b: Tensor | None) -> bool:
        return a is b if a is None or b is None else torch.equal(a, b)

    assert left.keys() == right.keys()
    return all(equal(a, b) for path in left for a, b in zip(left[path], right[path], strict=True))


@pytest.mark.parametrize("spec", [SPEC, QuantSpec(3, 64), QuantSpec(3, 32, symmetric=True)], ids=lambda s: s.name)
def test_each_start_is_better_than_the_one_before(walker: BlockWalker, step: BlockStep, spec: QuantSpec) -> None:
    errors = (output_error(walker, step, grids_of(walker, step, init, spec), spec) for init in INITS)
    minmax, search, gptq, refined = errors
    assert gptq < search < minmax
    assert refined < 1.02 * gptq  # it lowers the error of every layer; of a block of random weights hardly any more


def test_gptq_makes_up_for_the_blocks_before(walker: BlockWalker, step: BlockStep) -> None:
    """With almost unlimited damping there is no correction, only rounding with compensation."""
    corrected = grids_of(walker, step, "gptq")
    config = WarmStartConfig(init="gptq", correction_damping=1e9)
    uncorrected = initial_grids(walker, step, SPEC, config, TRAINED)
    assert output_error(walker, step, corrected, SPEC) < output_error(walker, step, uncorrected, SPEC)


def test_one_token_with_huge_sums_hardly_moves_the_start(walker: BlockWalker, step: BlockStep) -> None:
    expected = output_error(walker, step, grids_of(walker, step, "gptq"), SPEC)
    streams, sample = (step.fp, step.quantized), TRAINED[0]
    before = [stream.read(sample).clone() for stream in streams]
    for stream, value in zip(streams, before, strict=True):
        huge = value.clone()
        huge[0, -1] += 1000 * torch.randn(64)  # the last token: no other attends to it
        stream.write(sample, huge)
    grids = grids_of(walker, step, "gptq")
    for stream, value in zip(streams, before, strict=True):
        stream.write(sample, value)
    assert output_error(walker, step, grids, SPEC) < 1.2 * expected


def test_gptq_needs_no_residual_sums(walker: BlockWalker, step: BlockStep) -> None:
    walker.opened = replace(walker.opened, arch=replace(ARCH, sums=()))
    gptq, minmax = (output_error(walker, step, grids_of(walker, step, init), SPEC) for init in ("gptq", "minmax"))
    assert gptq < minmax


def test_minmax_is_that_of_the_weights_alone(walker: BlockWalker, step: BlockStep) -> None:
    grids = grids_of(walker, step, "minmax")
    assert tuple(grids) == ARCH.linears
    for path, linear in ARCH.named_linears(step.block):
        expected = initial_grid(linear.weight, SPEC, layer=path, init="minmax")
        assert torch.equal(grids[path].scale, expected.scale)
        assert torch.equal(grids[path].zero_point, expected.zero_point)
        assert grids[path].weight is None


@pytest.mark.parametrize("init", INITS)
def test_the_block_and_the_streams_are_not_changed(walker: BlockWalker, step: BlockStep, init: Init) -> None:
    before = values_of(step.block)
    streams = [stream.read(index).clone() for stream in (step.fp, step.quantized) for index in range(SAMPLES)]
    grids_of(walker, step, init)
    after = step.block.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert all(type(linear) is nn.Linear for _, linear in ARCH.named_linears(step.block))
    assert not any(module._forward_pre_hooks for module in step.block.modules())
    now = [stream.read(index) for stream in (step.fp, step.quantized) for index in range(SAMPLES)]
    assert all(torch.equal(a, b) for a, b in zip(streams, now, strict=True))


@pytest.mark.parametrize("init", ["search", "gptq", "refined"])
def test_statistics_are_of_the_samples_given(walker: BlockWalker, step: BlockStep, init: Init) -> None:
    before = grids_of(walker, step, init)
    add_noise(step, HELD_OUT)
    assert same_grids(grids_of(walker, step, init), before)
    add_noise(step, TRAINED)
    assert not same_grids(grids_of(walker, step, init), before)


def test_no_more_samples_are_used_than_asked_for(walker: BlockWalker, step: BlockStep) -> None:
    config = WarmStartConfig(init="gptq", samples=4)
    before = initial_grids(walker, step, SPEC, config, TRAINED)
    add_noise(step, range(7, SAMPLES))
    assert same_grids(initial_grids(walker, step, SPEC, config, TRAINED), before)
    add_noise(step, range(6, 7))
    assert not same_grids(initial_grids(walker, step, SPEC, config, TRAINED), before)


@pytest.mark.parametrize("init", ["search", "gptq", "refined"])
def test_a_block_starts_without_its_validation_samples(tiny: Tiny, init: Init) -> None:
    config = BlockAPConfig(SPEC, WarmStartConfig(init=init), FitConfig(epochs=0, validation_samples=len(HELD_OUT)))

    def packed(noise_on: range) -> dict[str, Tensor]:
        walker = walker_of(tiny)
        step = step_behind_rounded_block(walker)
        add_noise(step, noise_on)
        quantize_block(walker, step, config)
        return values_of(step.block)

    expected, other = packed(range(0)), packed(HELD_OUT)
    assert all(torch.equal(expected[name], other[name]) for name in expected)


def test_a_group_size_that_does_not_divide_is_refused(walker: BlockWalker, step: BlockStep) -> None:
    with pytest.raises(ConfigError, match=r"model\.layers\.1\.self_attn\.q_proj") as raised:
        grids_of(walker, step, "gptq", QuantSpec(2, 128))
    assert raised.value.allowed == "32, 64, -1 for this layer"
