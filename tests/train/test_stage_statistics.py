"""Statistics of experts are those of the tokens that the quantized stream sends to them, in both streams."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from eqat_mm.blocks.experts import SplitExperts
from eqat_mm.blocks.source import OpenModel, open_model
from eqat_mm.blocks.walker import BlockStep, BlockWalker, capture_front
from eqat_mm.quant.init import initial_grid
from eqat_mm.quant.spec import QuantSpec
from eqat_mm.runtime.ranks import ALONE, Ranks
from eqat_mm.train import stage_statistics
from eqat_mm.train.block_ap import BlockAPConfig, run_block_ap
from eqat_mm.train.fit import FitConfig
from eqat_mm.train.stage_statistics import StageStatistics, collect, rounds_at_a_time
from eqat_mm.train.warm_start import WarmStartConfig, initial_grids
from llava_adapters import arch_for
from llava_adapters.tiny import tiny_causal_lm
from tests.thread_ranks import in_threads
from tests.tolerances import assert_close

CPU = torch.device("cpu")
LENGTH, SAMPLES = 64, 6
ARCH = arch_for("mixtral")


def saved(folder: Path) -> OpenModel:
    """A Mixtral whose router tells tokens apart."""
    model, _ = tiny_causal_lm("mixtral", num_local_experts=4, num_experts_per_tok=2, initializer_range=0.1)
    for layer in model.model.layers:  # type: ignore[union-attr]
        nn.init.normal_(layer.mlp.gate.weight, std=0.5)
    model.save_pretrained(folder)  # type: ignore[operator]
    return open_model(folder, ARCH)


def weights_of(index: int) -> Tensor:
    """How much the tokens of a sample count: those at its end nothing, others 1 or 3."""
    weights = torch.tensor([1.0, 3.0]).repeat(LENGTH // 2).unsqueeze(0)
    weights[0, LENGTH - 5 * index :] = 0
    return weights


def step_of(opened: OpenModel, ranks: Ranks = ALONE, *, weighted: bool = False) -> tuple[BlockWalker, BlockStep]:
    """Block 0 with a quantized stream that differs, so that some tokens are sent elsewhere."""
    draw = torch.Generator().manual_seed(5)
    batches = [{"input_ids": torch.randint(0, 97, (1, LENGTH), generator=draw)} for _ in range(SAMPLES)]
    held = [batches[index] for index in ranks.share(SAMPLES)]
    captured = capture_front(opened, held, torch.float32)
    weights = [weights_of(index) for index in ranks.share(SAMPLES)] if weighted else None
    walker = BlockWalker(
        opened,
        captured,
        device=CPU,
        batch_tokens=48,
        ranks=ranks,
        weights=None if weights is None else lambda block: weights,
    )
    step = next(walker.walk())
    for place, index in enumerate(ranks.share(SAMPLES)):
        noise = torch.randn(1, LENGTH, 64, generator=torch.Generator().manual_seed(index))
        step.quantized.write(place, step.quantized.read(place) + 0.3 * noise)
    return walker, step


@torch.no_grad()
def seen_by(walker: BlockWalker, step: BlockStep, stream_of_router: str) -> tuple[Tensor, Tensor]:
    """What the experts of a block are given on a stream, [T, H], and where its tokens are sent, [T, K]."""
    found: list[tuple[Tensor, Tensor]] = []
    experts = step.block.get_submodule("mlp.experts")
    stream = getattr(step, stream_of_router)
    with experts.register_forward_pre_hook(lambda _, args: found.append((args[0], args[1]))):
        for index in range(SAMPLES):
            walker.run(step.block, step.call([index]), stream.read(index))
    hidden, sent = zip(*found, strict=True)
    return torch.cat(hidden), torch.cat(sent)


def statistics_of(walker: BlockWalker, step: BlockStep) -> dict[str, StageStatistics]:
    """Statistics by the first linear of every stage."""
    found = {}
    for measured in rounds_at_a_time(ARCH, step.block):
        seen = collect(walker, step, step.block, measured, range(SAMPLES))
        found |= {stage[0]: each for stage, each in zip(measured.stages, seen, strict=True)}
    return found


def test_both_streams_give_the_tokens_that_the_quantized_one_sends(tmp_path: Path) -> None:
    walker, step = step_of(saved(tmp_path))
    x_fp, sent_fp = seen_by(walker, step, "fp")
    x_q, sent = seen_by(walker, step, "quantized")
    assert not torch.equal(sent, sent_fp)
    seen = statistics_of(walker, step)
    for number in range(4):
        mine = (sent == number).any(1)
        found = seen[f"mlp.experts.{number}.gate_proj"]
        assert found.tokens == int(mine.sum())
        assert_close(found.hessian_II, x_q[mine].T @ x_q[mine], "gradient")
        assert_close(found.lack, (x_fp - x_q)[mine].T @ x_q[mine], "gradient")


def test_so_they_do_behind_the_gate(tmp_path: Path) -> None:
    walker, step = step_of(saved(tmp_path))
    x_fp, _ = seen_by(walker, step, "fp")
    x_q, sent = seen_by(walker, step, "quantized")
    experts = step.block.get_submodule("mlp.experts")
    assert isinstance(experts, SplitExperts)
    seen = statistics_of(walker, step)
    for number in range(4):
        mine, expert = (sent == number).any(1), experts[number]
        inner_fp, inner_q = (expert.act_fn(expert.gate_proj(x[mine])) * expert.up_proj(x[mine]) for x in (x_fp, x_q))
        found = seen[f"mlp.experts.{number}.down_proj"]
        assert_close(found.hessian_II, inner_q.T @ inner_q, "gradient")
        assert_close(found.lack, (inner_fp - inner_q).T @ inner_q, "gradient")


@pytest.mark.parametrize("world", [1, 2])
def test_tokens_count_as_they_are_said_to(tmp_path: Path, world: int) -> None:
    models = [saved(tmp_path) for _ in range(world)]
    walker, step = step_of(saved(tmp_path))
    x_fp, _ = seen_by(walker, step, "fp")
    x_q, sent = seen_by(walker, step, "quantized")
    weights = torch.cat([weights_of(index) for index in range(SAMPLES)]).flatten()
    found = in_threads(world, lambda ranks: statistics_of(*step_of(models[ranks.rank], ranks, weighted=True)))[0]
    for number in range(4):
        mine = (sent == number).any(1) & (weights > 0)
        seen, root = found[f"mlp.experts.{number}.gate_proj"], weights[mine, None].sqrt()
        assert seen.tokens == int(mine.sum())
        assert_close(seen.hessian_II, (x_q[mine] * root).T @ (x_q[mine] * root), "gradient")
        assert_close(seen.lack, ((x_fp - x_q)[mine] * root).T @ (x_q[mine] * root), "gradient")


def test_several_processes_give_the_sums_of_one(tmp_path: Path) -> None:
    models = [saved(tmp_path) for _ in range(3)]
    alone = statistics_of(*step_of(models[2]))
    for found in in_threads(2, lambda ranks: statistics_of(*step_of(models[ranks.rank], ranks))):
        for path, each in found.items():
            assert each.tokens == alone[path].tokens
            assert_close(each.hessian_II, alone[path].hessian_II, "gradient")
            assert_close(each.lack, alone[path].lack, "gradient", least=float(alone[path].hessian_II.abs().max()))


def test_as_many_experts_at_a_time_as_there_is_room_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    walker, step = step_of(saved(tmp_path))
    together = statistics_of(walker, step)
    monkeypatch.setattr(stage_statistics, "NUMBERS", 2 * 64 * 64)
    rounds = list(rounds_at_a_time(ARCH, step.block))
    assert [len(each.stages) for each in rounds] == [1, 1, 2, 2, 1, 1, 1, 1]
    for path, each in statistics_of(walker, step).items():
        assert torch.equal(each.hessian_II, together[path].hessian_II)


@pytest.mark.parametrize("init", ["search", "gptq", "refined"])
def test_an_expert_without_tokens_is_searched_on_its_weights_and_named(
    init: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    opened = saved(tmp_path)
    walker, step = step_of(opened)
    never = _keep_away_from(step, 3)
    spec = QuantSpec(2, 32)
    grids = initial_grids(walker, step, spec, WarmStartConfig(init=init), range(SAMPLES))  # type: ignore[arg-type]
    said = "".join(capsys.readouterr())
    assert "model.layers.0: 4 experts were sent 0 to " in said
    assert "1 of these for statistics: searched on weights alone" in said
    for path in never:
        weight = step.block.get_parameter(f"{path}.weight")
        eye = torch.eye(weight.shape[1])
        expected = initial_grid(weight, spec, layer=path, init="search", hessian=eye)
        assert torch.equal(grids[path].scale, expected.scale)
        assert grids[path].weight is None
    assert all(grid.scale.isfinite().all() for grid in grids.values())


def _keep_away_from(step: BlockStep, number: int) -> list[str]:
    """Let the router send no token to an expert; return the paths of its linears."""
    gate = step.block.get_submodule("mlp.gate")
    plain = gate.forward

    def forward(hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits, weights, sent = plain(hidden)
        other = torch.where(sent == number, (sent.flip(-1) + 1) % number, sent)
        return logits, weights, other

    gate.forward = forward  # type: ignore[method-assign]
    return [path for path in ARCH.linears_of(step.block) if path.startswith(f"mlp.experts.{number}.")]


def test_few_is_measured_against_the_inputs() -> None:
    eye = torch.eye(64)
    found = [StageStatistics(eye, eye, of_output=False, routed=True, tokens=count) for count in (63, 64, 511, 512)]
    assert [(seen.few, seen.corrects) for seen in found] == [
        (True, False),
        (False, False),
        (False, False),
        (False, True),
    ]
    assert (replace(found[0], routed=False).few, replace(found[0], routed=False).corrects) == (False, True)


def test_the_stream_correction_pays_where_streams_route_differently(tmp_path: Path) -> None:
    """Block-AP of two blocks: the second one's experts are corrected on tokens that the first one has moved."""
    saved(tmp_path / "full")
    draw = torch.Generator().manual_seed(9)
    batches = [{"input_ids": torch.randint(0, 97, (1, 64), generator=draw)} for _ in range(60)]
    errors = {}
    for damping in (0.05, 1e9):
        config = BlockAPConfig(
            quant=QuantSpec(4, 32),
            start=WarmStartConfig(init="gptq", correction_damping=damping),
            fit=FitConfig(epochs=0, validation_samples=3),
        )
        folder = tmp_path / str(damping)
        run_block_ap(
            open_model(tmp_path / "full", ARCH),
            batches,
            config,
            folder,
            device=CPU,
            source="t",
            provenance={"config": {}},
        )
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        errors[damping] = json.loads(lines[-1])["loss_after"]
    assert errors[0.05] < errors[1e9]
